"""What running the laws needs beside the package itself: imported here and nowhere else, and missed by name."""

from __future__ import annotations

import importlib
from types import ModuleType

from peftfx.errors import PeftfxError


def needed(name: str) -> ModuleType:
    """A module of an extra.

    Raises:
        PeftfxError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        hint = "pip install 'peftfx[testing]'"
        raise PeftfxError(
            f"the laws need the package {name}, which is not installed", "peftfx.testing", hint
        ) from error
