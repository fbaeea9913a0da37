"""Load base models from GGUF files, the format of llama.cpp.

transformers knows the architectures and the names of their tensors. The package `gguf` reads the file. Weights of
layers stay in their blocks (`Coded`) if the file has the blocks row by row; other weights are dequantised. A few
architectures have special code in transformers. Such a model is dequantised completely, and takes as much memory as in
floating point.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftfx.bases.files.gguf_tensors import read_tensors
from peftfx.bases.quantised import QUANTISED, blank, filled_model, outline
from peftfx.bases.tasks import maker_of, resolve_task
from peftfx.errors import PeftfxError, first_line
from peftfx.files import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NEEDED = ("gguf", "accelerate")  #: the packages that transformers needs to read the files
METHOD, LINK = "gguf", "weights.gguf"  #: the method and the file name in a directory that stands in for a GGUF file


def gguf_config(file: Path) -> PreTrainedConfig:
    """Return transformers' config of the model in a file.

    Raises:
        PeftfxError: a package of `NEEDED` is missing, the file is broken, or transformers does not know its
            architecture.
    """
    from transformers import AutoConfig

    with _reading(file):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def load_gguf(
    file: Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    weights: bool = True,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> PreTrainedModel:
    """Load the model in a GGUF file, in eval mode.

    Args:
        file: the GGUF file, which has the weights, config and tokenizer.
        task: the task, which decides the head; by default that of a language model.
        num_labels: the number of labels of a classification head.
        weights: whether to read the weights. If not, the parameters stay uninitialised.
        dtype: the dtype of the parameters; by default float32.
        given: the names of tensors that an adapter brings. Only these may be missing from the file.

    Raises:
        PeftfxError: for the reasons of `gguf_config`, or the file lacks a weight of the model.
    """
    config, dtype = gguf_config(file), dtype or torch.float32
    if num_labels is not None:
        config.num_labels = num_labels
    language = "text2text-generation" if config.is_encoder_decoder else "text-generation"
    maker: Any = maker_of(config, resolve_task(task or language), file)
    if not weights:
        return outline(maker, config, dtype).eval()  # type: ignore[return-value]
    empty = blank(maker, config, dtype)
    with _reading(file):
        tensors = read_tensors(file, empty, dtype)
        found = _whole(file, maker, config, dtype) if tensors is None else filled_model(maker, config, tensors, dtype)
    model: Any = found[0]
    info: Mapping[str, Any] = found[1]
    lacking = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])} - set(given)
    if missing := sorted(lacking):
        hint = f"name the task of the file's model (it was loaded as a {maker.__name__})"
        raise PeftfxError(f"the file lacks the weights of {', '.join(missing[:8])}", str(file), hint)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _whole(file: Path, maker: Any, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the model dequantised by transformers. Return it with transformers' loading info."""
    from transformers import GgufConfig

    return maker.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=dtype,
    )


def unpack(file: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer in transformers' format: config, safetensors, tokenizer files."""
    config = gguf_config(file)
    language = "text2text-generation" if config.is_encoder_decoder else "text-generation"
    with _reading(file):
        model, _ = _whole(file, maker_of(config, resolve_task(language), file), config, torch.float32)
    model.save_pretrained(directory)
    _write_tokenizer(file, directory)


def stand_in_of_file(file: Path, directory: Path) -> None:
    """Write a directory that `load_base` loads as the file: config, tokenizer files, a link to the weights."""
    config = gguf_config(file).to_dict()
    config[QUANTISED] = {"quant_method": METHOD}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / LINK).symlink_to(file.resolve())
    _write_tokenizer(file, directory)


def stood_for(base: Path) -> Path | None:
    """Return the GGUF file that a base is, or that its directory stands in for; None for any other base."""
    return base if is_gguf(base) else base / LINK if is_gguf(base / LINK) else None


def _write_tokenizer(file: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    with _reading(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def as_directory(base: Path) -> Iterator[Path]:
    """Yield a base model's directory. For a GGUF file, yield a temporary directory that stands in for it."""
    if not is_gguf(base):
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="peftfx-") as directory:
        stand_in_of_file(base, Path(directory))
        yield Path(directory)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        names = " ".join(lacking)
        raise PeftfxError(
            f"GGUF files need packages that are not installed: {names}", str(file), f"pip install {names}"
        )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides transformers' progress bar, which has no other switch
            yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, struct.error) as error:
        what = f"cannot read this GGUF file: {first_line(error)}"
        raise PeftfxError(what, str(file), "convert the model's original files, or download it again") from error
