"""Read configs by transformers, and turn the errors of its code into `PeftfxError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from peftfx.errors import PeftfxError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The errors of transformers' own checks, and of its code for values that are not checked.
_RAISED = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, NameError, StrictDataclassError),
)


def read_config(directory: Path, **options: object) -> PreTrainedConfig:
    """Read transformers' config in a directory. No code from the directory is run.

    Raises:
        PeftfxError: the config is missing, its model type is unknown to transformers, or a field makes no sense.
    """
    from transformers import AutoConfig

    with understanding(directory / "config.json", "cannot read the model's config"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)


@contextlib.contextmanager
def understanding(
    where: str | Path,
    what: str,
    hint: str = "compare the file with the original",
    also: type[Exception] | None = None,
) -> Iterator[None]:
    """Turn errors of transformers about a file or an input into a PeftfxError while this context lasts.

    Args:
        where: the file or the input.
        what: what cannot be done.
        hint: what the user can do.
        also: a class of errors of the called code's own, which is no error of Python's.
    """
    raised = _RAISED if also is None else (*_RAISED, also)
    try:
        yield
    except raised as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise PeftfxError(f"{what}: {told}", str(where), hint) from error
