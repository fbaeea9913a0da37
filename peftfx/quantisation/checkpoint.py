"""`read_checkpoint` reads the tensors of a quantised base's files, each quantised weight as its codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftfx.errors import PeftfxError, nearest, shown
from peftfx.graph.lazy_weights import Stored
from peftfx.quantisation import awq, bitsandbytes4, bitsandbytes8, compressed, fp8, gptq, torchao
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.codes import Codes
from peftfx.quantisation.packed import Packed


@dataclass(frozen=True)
class Format:
    """A storage format of quantised layers.

    Attributes:
        marks: names after a module's path, one of which each quantised layer has.
        names: all names that such a layer may have.
        read: a function that reads a layer's codes.
    """

    marks: tuple[str, ...]
    names: frozenset[str]
    read: Callable[[Packed], Codes]


_FORMATS = {
    "bitsandbytes 4 bits": Format(bitsandbytes4.MARKS, bitsandbytes4.NAMES, bitsandbytes4.read),
    "bitsandbytes 8 bits": Format(bitsandbytes8.MARKS, bitsandbytes8.NAMES, bitsandbytes8.read),
    "gptq": Format(gptq.MARKS, gptq.NAMES, gptq.read),
    "awq": Format(awq.MARKS, awq.NAMES, awq.read),
    "compressed-tensors": Format(compressed.MARKS, compressed.NAMES, compressed.read),
    "torchao": Format(torchao.MARKS, torchao.NAMES, torchao.read),
    "fp8": Format(fp8.MARKS, fp8.NAMES, fp8.read),
    "fbgemm_fp8": Format(fp8.MARKS, fp8.NAMES, fp8.read),
}
_WEIGHTS = ("weight", "bias")  #: whose integers mean nothing without scales; other integers are a model's buffers
_KNOWN = ("bitsandbytes", *(name for name in _FORMATS if " " not in name))


def format_of(config: object, where: Path) -> Format:
    """Return the format that a `quantization_config` names.

    Raises:
        PeftfxError: the config names no format, or a format that peftfx cannot read.
    """
    if not isinstance(config, Mapping):
        raise PeftfxError(
            f"quantization_config is not an object: {shown(config)}", str(where), "download the file again"
        )
    name = str(config.get("quant_method", "bitsandbytes" if _bits(config) else "unknown"))
    if name == "bitsandbytes":
        name = f"bitsandbytes {_bits(config) or 4} bits"
    if name not in _FORMATS:
        hint = nearest(name, _KNOWN) or f"use the unquantised model, or one of {', '.join(_KNOWN)}"
        raise PeftfxError(f"peftfx cannot read a base that is quantised in this way: {shown(name)}", str(where), hint)
    return _FORMATS[name]


def _bits(config: Mapping[str, object]) -> int:
    """Return the bits in bitsandbytes' config, or 0 if it names none."""
    names = {4: ("load_in_4bit", "_load_in_4bit"), 8: ("load_in_8bit", "_load_in_8bit")}
    return next((bits for bits, own in names.items() if any(config.get(name) is True for name in own)), 0)


def read_checkpoint(
    files: Iterable[Path], config: Mapping[str, object], where: Path, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of these safetensors files, by the names of a model that is not quantised.

    No values are loaded: plain weights are memory-mapped and appear in `dtype`, and quantised weights are `Coded`
    tensors.

    Raises:
        PeftfxError: a layer's tensors are incomplete or do not fit, or integers belong to no layer.
    """
    layers = format_of(config, where)
    tensors, told = _mapped(files)
    marks = {name: mark for name in tensors for mark in layers.marks if name.endswith(f".{mark}")}
    paths = dict.fromkeys(name.removesuffix(f".{mark}") for name, mark in marks.items())
    found: dict[str, Tensor] = {}
    for path in paths:
        own = {name: tensors.pop(f"{path}.{name}") for name in layers.names if f"{path}.{name}" in tensors}
        found[f"{path}.weight"] = Coded(
            layers.read(Packed(path, own, _of_layer(config, told, path), str(where))), dtype
        )
    if not paths:
        what = "the files have no layer that is quantised as the config says"
        raise PeftfxError(what, str(where), f"the names of such tensors end in {' or '.join(layers.marks)}")
    _refuse_left(tensors, layers, where)
    plain = {name: t for name, t in tensors.items() if t.is_floating_point() or not name.endswith(_WEIGHTS)}
    narrow = {n: Stored(t, dtype) for n, t in plain.items() if t.is_floating_point() and t.dtype != dtype}
    return found | plain | narrow


def _mapped(files: Iterable[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the files, and the files' metadata."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    told: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            told |= opened.metadata() or {}
    return tensors, told


def _of_layer(config: Mapping[str, object], told: Mapping[str, str], path: str) -> Mapping[str, object]:
    """Return the config, with a layer's entry in the files' metadata if that is JSON."""
    try:
        return {**config, torchao.LAYER: json.loads(told[f"{path}.weight"])}
    except (KeyError, ValueError, RecursionError):
        return config


def _refuse_left(tensors: Mapping[str, Tensor], layers: Format, where: Path) -> None:
    """Refuse tensors left over from an incomplete layer: integers are useless without their scales."""
    parts = tuple(f".{name}" for name in layers.names if name != "weight")
    narrow = (torch.int8, torch.uint8, torch.int32, fp8.E4M3, torch.float8_e5m2)
    left = [n for n, t in tensors.items() if n.endswith(parts) or (n.endswith("weight") and t.dtype in narrow)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        kind = str(tensors[left[0]].dtype).removeprefix("torch.")
        what = f"a quantised layer is incomplete: {left[0]} ({kind}){more} without {' or '.join(layers.marks)}"
        raise PeftfxError(what, str(where), "download the base again, or save it again with its quantiser")
