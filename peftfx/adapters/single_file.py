"""LoRAs in one safetensors file, as kohya's trainers and diffusers write them: reading and writing.

kohya's keys are `PREFIX_path_with_underscores.lora_down.weight`, `.lora_up.weight` and `.alpha`; diffusers' are
`PREFIX.path.lora_A.weight` and `.lora_B.weight`, or `.lora.down.weight` and `.lora.up.weight`. A file may hold LoRAs of
several models, each with a prefix of its own (`lora_unet`, `lora_te1`; `unet`, `text_encoder`). diffusers puts the
LoRA's config into the file's metadata, and its scale is then the config's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError, warn
from peftfx.methods.lora import LoRA

_CONFIG_KEY = "lora_adapter_metadata"
#: Fields of a config that say where its LoRA acts. The names of the tensors say it.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
KOHYA, DIFFUSERS = "kohya", "diffusers"
_DOWN, _UP, _ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
_SUFFIXES = {
    ".lora_down.weight": _DOWN,
    ".lora.down.weight": _DOWN,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_A.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.up.weight": _UP,
    ".lora_B.weight": _UP,
    ".alpha": _ALPHA,
}


def as_peft(path: Path, base: nn.Module) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return HF PEFT's config and tensors for the LoRA of this model in a file.

    A warning names the LoRAs of other models in the file.

    Raises:
        PeftfxError: the file cannot be read, has no LoRA of this model, or has tensors for this model that are not a
            LoRA's.
    """
    tensors, metadata = read_single_file(path)
    by_stem: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), "")
        by_stem.setdefault(key.removesuffix(suffix) if suffix else key, {})[_SUFFIXES.get(suffix, key)] = tensor
    modules = {path: m for path, m in own_modules(base) if path}
    known = {name: path for path in modules for name in (path, path.replace(".", "_"))}
    twice = [path for path in modules if known[path.replace(".", "_")] != path]
    if twice:
        what = "with underscores for dots, these modules of the model have one name"
        raise PeftfxError(what, ", ".join(twice[:2]), "convert the file where it was made")
    prefixes = {p for stem in by_stem for p in _prefixes(stem) if stem[len(p) :] in known}
    if not prefixes:
        hint = "give the directory of the model that it is of: a U-Net, a transformer or a text encoder"
        raise PeftfxError("no key of it names a module of this model", str(path), hint)
    prefix = min(prefixes, key=lambda p: (-sum(s.startswith(p) and s[len(p) :] in known for s in by_stem), len(p)))
    own = {stem[len(prefix) :]: found for stem, found in by_stem.items() if stem.startswith(prefix)}
    if others := sorted(stem for stem in by_stem if not stem.startswith(prefix)):
        warn(f"{path}: {len(others)} modules are of other models, and left out: {', '.join(others[:3])}")
    wrong = sorted(
        n for n, found in own.items() if n not in known or not {_DOWN, _UP} <= found.keys() <= {_DOWN, _UP, _ALPHA}
    )
    if wrong:
        what = f"{len(wrong)} modules are not this model's, or have more or less than a LoRA: {', '.join(wrong[:3])}"
        raise PeftfxError(what, str(path), "is it a LoRA (no LoHa, no DoRA), trained on this model by these names?")
    config = _config({known[n]: found for n, found in own.items()}) | _told(metadata, prefix, path)
    return config, {
        f"base_model.model.{known[n]}.{name}": _fitted(modules[known[n]], found[name])
        for n, found in own.items()
        for name in (_DOWN, _UP)
    }


def read_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        PeftfxError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PeftfxError(f"cannot be read as safetensors: {error}", str(path), "give a .safetensors file") from error


def _told(metadata: Mapping[str, str], prefix: str, path: Path) -> dict[str, object]:
    """Return what the metadata of a file of diffusers say of a LoRA: the fields of its config, but for its targets."""
    raw = metadata.get(_CONFIG_KEY)
    if not raw:
        return {}
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        what = f"its metadata {_CONFIG_KEY} are no config of a LoRA"
        raise PeftfxError(what, str(path), "save the file again")
    own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    return {name: value for name, value in own.items() if "." not in name and name not in _PLACES}


def _prefixes(stem: str) -> list[str]:
    """Return the possible prefixes of a key before the module's path: up to each dot or underscore."""
    return ["", *(stem[: i + 1] for i, letter in enumerate(stem) if letter in "._")]


def _config(own: Mapping[str, Mapping[str, Tensor]]) -> dict[str, object]:
    ranks = {path: len(found[_DOWN]) for path, found in own.items()}
    alphas = {path: float(found[_ALPHA]) if _ALPHA in found else float(ranks[path]) for path, found in own.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(own),
        "rank_pattern": {path: n for path, n in ranks.items() if n != r},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
    }


def _fitted(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return the tensor for a module; a 1x1 conv factor of a linear layer becomes a matrix."""
    linear = isinstance(module, nn.Linear) and tensor.ndim == 4
    return (tensor[:, :, 0, 0] if linear else tensor).contiguous()


@torch.no_grad()
def as_single_file(adapter: Adapter, how: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by the names of a single file; diffusers' have the scale in B.

    Raises:
        PeftfxError: the adapter is more than a plain LoRA on whole linear and conv layers; such files hold only that.
    """
    found: dict[str, Tensor] = {}
    for placement in adapter.placements:
        at, method = placement.on_weight, placement.method
        p = {} if at is None else adapter.params(at)
        if (
            at is None
            or at.part
            or not isinstance(method, LoRA)
            or p.keys() != {"lora_A", "lora_B"}
            or method.use_dora
            or method.use_bdlora
        ):
            what = f"a single file holds plain LoRAs of whole layers, and no {type(method).__name__} as this one"
            raise PeftfxError(what, placement.site.path, "convert the adapter to a LoRA first")
        if at.site.kind not in ("linear", "conv"):
            raise PeftfxError(f"a single file holds no LoRA of a {at.site.kind}", at.site.path, "train it without")
        a, b, path = p["lora_A"].detach().contiguous(), p["lora_B"].detach().contiguous(), at.site.path
        if how == KOHYA:
            stem = f"{prefix}_{path.replace('.', '_')}"
            found |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
            found[f"{stem}.alpha"] = torch.tensor(method.scaling * method.r)
        else:
            found |= {f"{prefix}.{path}.{_DOWN}": a, f"{prefix}.{path}.{_UP}": b * method.scaling}
    if adapter.overrides:
        raise PeftfxError(
            "a single file cannot hold copies of the base's tensors",
            adapter.overrides[0].key,
            "train the adapter without them",
        )
    return found
