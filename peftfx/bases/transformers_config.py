"""Read configs by transformers, build models without values, and turn the errors of its code into `PeftfxError`."""

from __future__ import annotations

import contextlib
import threading
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


_BUILDING = threading.RLock()


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Leave the parameters of models that are built inside uninitialised; in one thread at a time.

    transformers replaces torch's functions of `torch.nn.init` for the whole process. Two threads that leave in another
    order than they entered would leave them replaced: no model that is made later would get initial values.
    """
    from transformers.initialization import no_init_weights

    with _BUILDING, no_init_weights():
        yield


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
