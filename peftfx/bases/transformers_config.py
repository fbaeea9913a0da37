"""Configs as transformers reads them, and what its code raises for what it cannot work with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from peftfx.errors import PeftfxError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What transformers' own checks raise, and what its code does with what they do not check.
_RAISED = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, NameError, StrictDataclassError),
)


def read_config(directory: Path, **options: object) -> PreTrainedConfig:
    """transformers' config in a directory; no code of the directory's own is run.

    Raises:
        PeftfxError: there is none, it is of a kind that transformers does not know, or a field makes no sense.
    """
    from transformers import AutoConfig

    with understanding(directory / "config.json", "cannot read the model's config"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)


@contextlib.contextmanager
def understanding(where: str | Path, what: str, hint: str = "compare the file with the original") -> Iterator[None]:
    """Turn what transformers raises inside, for a file or an input that it cannot work with, into a PeftfxError."""
    try:
        yield
    except _RAISED as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise PeftfxError(f"{what}: {told}", str(where), hint) from error
