"""Base models from GGUF files, as llama.cpp has them: what is stored in blocks of small integers, in floating point.

transformers reads the file, for the architectures that it knows there; the package `gguf` undoes the quantisation. The
weights are those of the quantised model, and take as much memory as in floating point.
"""

from __future__ import annotations

import contextlib
import io
import struct
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftfx.bases.tasks import maker_of, resolve_task
from peftfx.errors import PeftfxError, first_line
from peftfx.files import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NEEDED = ("gguf", "accelerate")  #: by transformers, which reads the files


def gguf_config(file: Path) -> PreTrainedConfig:
    """transformers' config of the model in a file.

    Raises:
        PeftfxError: a package of `NEEDED` is missing, the file is broken, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    with _reading(file):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def load_gguf(
    file: Path, *, task: str | None = None, weights: bool = True, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in a file, in eval mode.

    Args:
        file: the weights, config and tokenizer in one.
        task: makes the head; by default that of a language model.
        weights: read them; otherwise parameters stay uninitialised.
        dtype: of the parameters; by default float32.

    Raises:
        PeftfxError: as above, or the file lacks a weight of the model.
    """
    from transformers import GgufConfig
    from transformers.initialization import no_init_weights

    config, dtype = gguf_config(file), dtype or torch.float32
    language = "text2text-generation" if config.is_encoder_decoder else "text-generation"
    maker: Any = maker_of(config, resolve_task(task or language), file)
    if not weights:
        with no_init_weights():
            return maker._from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    with _reading(file):
        model, info = maker.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
            dtype=dtype,
        )
    if missing := sorted(info["missing_keys"]):
        hint = f"name the task that the file's model is for (this is a {maker.__name__})"
        raise PeftfxError(f"the file lacks the weights of {', '.join(missing[:8])}", str(file), hint)
    return model.eval()  # type: ignore[no-any-return]


def unpack(file: Path, directory: Path) -> None:
    """Write a file's model and tokenizer as transformers' own: config, safetensors, tokenizer files."""
    from transformers import AutoTokenizer

    load_gguf(file).save_pretrained(directory)
    with _reading(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def as_directory(base: Path) -> Iterator[Path]:
    """A base model's directory as it is; a GGUF file, unpacked for a while."""
    if not is_gguf(base):
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="peftfx-") as directory:
        unpack(base, Path(directory))
        yield Path(directory)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        names = " ".join(lacking)
        raise PeftfxError(f"GGUF files need what is not installed: {names}", str(file), f"pip install {names}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar, which knows no other way to be left out
            yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, struct.error) as error:
        what = f"cannot read this GGUF file: {first_line(error)}"
        raise PeftfxError(what, str(file), "convert the model's original files, or download it again") from error
