"""The packages that only the laws need: imported here, with an error that names a missing package."""

from __future__ import annotations

import importlib
from types import ModuleType

from peftfx.errors import PeftfxError


def needed(name: str) -> ModuleType:
    """Import and return a module of an optional package.

    Raises:
        PeftfxError: the package is not installed.
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
