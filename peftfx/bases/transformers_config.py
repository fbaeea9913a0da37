"""Configs as transformers reads them, and what its code raises where a config's fields make no sense."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from peftfx.errors import PeftfxError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What transformers' checks of a config raise, and what its models' code does with fields that they do not check.
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
def understanding(where: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises inside, for the files of a model, into a PeftfxError about them."""
    try:
        yield
    except _RAISED as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise PeftfxError(f"{what}: {told}", str(where), "compare the file with the original") from error
