"""The keys of a single file: a module's name, with a prefix for its model, and the name of the module's tensor.

kohya's keys are `PREFIX_path_with_underscores.lora_down.weight`, `.lora_up.weight` and `.alpha`, and for DoRA
`.dora_scale`; LyCORIS adds `.lora_mid.weight`, `.hada_w1_a`, `.lokr_w1` and the like. diffusers' keys are
`PREFIX.path.lora_A.weight` and `.lora_B.weight`, earlier `.lora.down.weight`, and before that
`.processor.to_q_lora.down.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftfx.contract.common.lora.dora import MAGNITUDE
from peftfx.errors import PeftfxError
from peftfx.files import is_folder, require_readable

DOWN, UP, BIAS, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha"
HADAMARD = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
CORES = frozenset({"hada_t1", "hada_t2"})
KRONECKER = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
SCALE = ".dora_scale"
_CORE = "lora_mid.weight"
#: Tensors of LyCORIS's other kinds. Their modules are told by name.
_UNREAD = (
    *(_CORE, "diff", "diff_b", "on_input", "oft_blocks", "oft_diag"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
)
_SUFFIXES = {
    ".lora_down.weight": DOWN,
    ".lora.down.weight": DOWN,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_A.weight": DOWN,
    ".lora_A.default.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora.up.weight": UP,
    ".lora_linear_layer.up.weight": UP,
    ".lora_B.weight": UP,
    ".lora_B.default.weight": UP,
    ".lora_B.bias": BIAS,
    ".lora_magnitude_vector": MAGNITUDE,
    SCALE: MAGNITUDE,
    ".lora.down.weight.alpha": ALPHA,  # of diffusers, for layers whose names it takes for those of processors
    ".alpha": ALPHA,
    **{f".{name}": name for name in (*HADAMARD, *CORES, *KRONECKER, *_UNREAD)},
}
#: Layers of an attention in the names of diffusers' attention processors.
_PROCESSOR = (
    (re.compile(r"\.processor(?=\.to_)"), ""),
    (re.compile(r"\.to_out_lora\."), ".to_out.0.lora."),
    (re.compile(r"\.to_([qkv])_lora\."), r".to_\1.lora."),
)


def read_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        PeftfxError: the file cannot be read.
    """
    if is_folder(path):
        hint = "give the .safetensors file in it, or an adapter's folder with --adapter"
        raise PeftfxError("this is a folder, and one file is read here", str(path), hint)
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PeftfxError(f"cannot be read as safetensors: {error}", str(path), "give a .safetensors file") from error


def without_cores(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the core of each conv's LoRA in its A: `lora_mid`, [r, r, kernel], between 1x1 convs."""
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(f".{_CORE}")]:
        core, down = found[key], found.get(other := f"{key.removesuffix(_CORE)}lora_down.weight")
        if down is not None and core.ndim > 2 and len(down) == core.shape[1]:
            found[other] = torch.einsum("rs...,si->ri...", core, down.flatten(1))
            del found[key]
    return found


def by_stem(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module by their names, by the part of their keys that names the module."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for pattern, replacement in _PROCESSOR:
            key = pattern.sub(replacement, key)
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), "")
        found.setdefault(key.removesuffix(suffix) if suffix else key, {})[_SUFFIXES.get(suffix, key)] = tensor
    return found
