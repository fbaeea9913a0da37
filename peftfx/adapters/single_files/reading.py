"""Adapters in one safetensors file, of kohya's trainers, LyCORIS and diffusers, as HF PEFT has them.

A file may hold adapters of several models, each with a prefix of its own (`lora_unet`, `lora_te1`; `unet`,
`text_encoder`). The ranks, and what kind of adapter it is, are read from the tensors. diffusers puts the config of a
LoRA into the file's metadata, and its scale is then the config's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.single_files.foreign_names import renamed
from peftfx.adapters.single_files.keys import (
    ALPHA,
    BIAS,
    CORES,
    DOWN,
    HADAMARD,
    KRONECKER,
    SCALE,
    UP,
    by_stem,
    read_single_file,
    without_cores,
)
from peftfx.adapters.single_files.kronecker import is_kronecker, kronecker_config
from peftfx.bases.guests import own_modules
from peftfx.contract.common.lora.dora import MAGNITUDE
from peftfx.contract.common.patterns import path_pattern
from peftfx.errors import PeftfxError, listed, warn

_CONFIG_KEY = "lora_adapter_metadata"
#: Fields of a config that say where its LoRA acts. The names of the tensors say it.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_LORA = frozenset({DOWN, UP})
Parts = dict[str, Tensor]


def as_peft(path: Path, base: nn.Module) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return HF PEFT's config and tensors for the adapter of this model in a file: a LoRA, DoRA, LoHa or LoKr.

    A warning names the adapters of other models in the file.

    Raises:
        PeftfxError: the file cannot be read, has no adapter of this model, or has tensors for this model that are of
            none of these.
    """
    given, metadata = read_single_file(path)
    _refuse_inputs(given, path)
    _refuse_alphas(given, path)
    tensors = without_cores(given)
    modules = {path: m for path, m in own_modules(base) if path}
    found = _matched(by_stem(tensors), modules, path)
    if not found.fits:
        other = _matched(renamed(tensors, base), modules, path)
        found = other if other.fits else found
    if not found.own and not found.wrong:
        hint = "give the directory of the model that it is of: a U-Net, a transformer or a text encoder"
        raise PeftfxError("no key of it names a module of this model", str(path), hint)
    if found.wrong:
        what = "modules of it are not this model's, or have more or less than a LoRA, DoRA, LoHa or LoKr"
        hint = "was it trained on this model, by these names? peftfx reads no other kind in one file"
        raise PeftfxError(f"{what}: {listed(found.wrong, 3)}", str(path), hint)
    if found.others:
        warn(f"{path}: modules of other models are left out: {listed(found.others, 3)}")
    config = _config(found.own, modules, path) | _told(metadata, found.prefix, path)
    return config, {
        f"base_model.model.{place}.{name}": _fitted(modules[place], name, tensor, f"{path}: {place}")
        for place, parts in found.own.items()
        for name, tensor in parts.items()
        if name != ALPHA
    }


@dataclass(frozen=True)
class _Match:
    """The keys of a file beside a model, under one prefix.

    Attributes:
        own: the tensors by module path.
        wrong: what has the prefix and is no adapter of a module.
        others: what has another prefix.
        odd: how many modules have another number of inputs.
    """

    prefix: str
    own: dict[str, Parts]
    wrong: list[str]
    others: list[str]
    odd: int = 0

    @property
    def fits(self) -> bool:
        return bool(self.own) and not self.wrong


def _matched(stems: Mapping[str, Parts], modules: Mapping[str, nn.Module], path: Path) -> _Match:
    """Return the keys of this model: those with the prefix by which most keys name a module of it.

    Of prefixes with equally many, the one counts by which the fewest keys are wrong, and then the one by which the
    fewest layers have another number of inputs.

    Raises:
        PeftfxError: two modules of the model have one name in such files; or the keys of two prefixes fit it equally.
    """
    known = {name: path for path in modules for name in (path, path.replace(".", "_"))}
    twice = [path for path in modules if known[path.replace(".", "_")] != path]
    if twice:
        what = "with underscores for dots, these modules of the model have one name"
        raise PeftfxError(what, ", ".join(twice[:2]), "convert the file where it was made")
    counts = Counter(p for stem in stems for p in _prefixes(stem) if stem[len(p) :] in known)
    most = max(counts.values(), default=0)
    matches = [_match(prefix, stems, modules, known) for prefix, count in counts.items() if count == most]
    if not matches:
        return _Match("", {}, [], sorted(stems))
    first, *rest = sorted(matches, key=lambda m: (len(m.wrong), m.odd, len(m.prefix), m.prefix))
    same = [m.prefix for m in rest if (len(m.wrong), m.odd) == (len(first.wrong), first.odd)]
    if twins := [prefix for prefix in same if not prefix.startswith(first.prefix)]:
        what = f"adapters of several models in it fit this one: the keys with {', '.join([first.prefix, *twins])}"
        raise PeftfxError(what, str(path), "put those of this model alone into a file, or export the whole pipeline")
    return first


def _match(
    prefix: str, stems: Mapping[str, Parts], modules: Mapping[str, nn.Module], known: Mapping[str, str]
) -> _Match:
    """Sort the keys of a file by one prefix: this model's modules, what is wrong, and what has another prefix."""
    named = {stem[len(prefix) :]: parts for stem, parts in stems.items() if stem.startswith(prefix)}
    own = {known[name]: parts for name, parts in named.items() if name in known and _is_adapter(parts)}
    wrong = sorted(name for name in named if name not in known or known[name] not in own)
    odd = sum(not _has_inputs(modules[path], parts) for path, parts in own.items())
    return _Match(prefix, own, wrong, sorted(stem for stem in stems if not stem.startswith(prefix)), odd)


def _has_inputs(module: nn.Module, parts: Parts) -> bool:
    """Return whether a linear layer has as many inputs as its A or W1b, as far as one can tell."""
    factor = parts.get(DOWN, parts.get("hada_w1_b"))
    return not isinstance(module, nn.Linear) or factor is None or factor.shape[1] == module.in_features


def _prefixes(stem: str) -> list[str]:
    """Return the possible prefixes of a key before the module's path: up to each dot or underscore."""
    return ["", *(stem[: i + 1] for i, letter in enumerate(stem) if letter in "._")]


def _is_adapter(parts: Parts) -> bool:
    names = parts.keys() - {ALPHA}
    return _LORA <= names <= _LORA | {MAGNITUDE, BIAS} or names in (HADAMARD, HADAMARD | CORES) or is_kronecker(names)


def _config(own: Mapping[str, Parts], modules: Mapping[str, nn.Module], path: Path) -> dict[str, object]:
    """Return the config of an adapter, by its tensors.

    Raises:
        PeftfxError: one adapter of HF PEFT cannot be all of it.
    """
    lora = _all_or_none(own, DOWN, path)
    products = any(parts.keys() & KRONECKER for parts in own.values())
    if products:
        _all_or_none(own, "hada_w1_b", path)
        ranks, alphas, options = kronecker_config(own, modules, str(path))
    else:
        ranks = {place: len(parts[DOWN] if lora else parts["hada_w1_b"]) for place, parts in own.items()}
        alphas = {place: float(parts[ALPHA]) if ALPHA in parts else float(ranks[place]) for place, parts in own.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, object] = {
        "r": r,
        "target_modules": _targets(own, modules),
        "rank_pattern": path_pattern(ranks, r),
        "alpha_pattern": path_pattern(alphas, alpha),
    }
    if products:
        return {"peft_type": "LOKR", "alpha": alpha, **options, **config}
    if not lora:
        cores = any(parts.keys() >= CORES for parts in own.values())
        return {"peft_type": "LOHA", "alpha": alpha, "use_effective_conv2d": cores, **config}
    kinds = {"use_dora": _all_or_none(own, MAGNITUDE, path), "lora_bias": _all_or_none(own, BIAS, path)}
    return {"peft_type": "LORA", "lora_alpha": alpha, **kinds, **config}


def _targets(own: Mapping[str, Parts], modules: Iterable[str]) -> list[str] | str:
    """Return the modules' paths; or, where a path is the end of another module's, an expression for these alone."""
    parts = (path.split(".") for path in modules if path not in own)
    if any(".".join(names[i:]) in own for names in parts for i in range(1, len(names))):
        return "|".join(map(re.escape, sorted(own)))
    return sorted(own)


def _all_or_none(own: Mapping[str, Parts], name: str, path: Path) -> bool:
    without = [place for place, parts in own.items() if name not in parts]
    if without and len(without) < len(own):
        what = f"{len(without)} of its {len(own)} modules have no {name}, and an adapter of HF PEFT is of one kind"
        raise PeftfxError(f"{what}: {', '.join(without[:3])}", str(path), "train it as one kind")
    return not without


def _refuse_inputs(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a DoRA of LyCORIS with one magnitude for each input, [1, in, ...]: HF PEFT's are of the outputs."""
    key = next((key for key, t in tensors.items() if key.endswith(SCALE) and t.ndim > 1 and t.numel() != len(t)), None)
    if key is not None:
        what = f"{key} has one magnitude for each input, and HF PEFT's DoRA has one for each output"
        raise PeftfxError(what, str(path), "train it with magnitudes of outputs (LyCORIS: wd_on_out=True)")


def _refuse_alphas(tensors: Mapping[str, Tensor], path: Path) -> None:
    key = next((key for key, t in tensors.items() if key.endswith(f".{ALPHA}") and t.numel() != 1), None)
    if key is not None:
        what = f"{key} has {tensors[key].numel()} numbers, and the alpha of a module is one"
        raise PeftfxError(what, str(path), "save the file again where it was made")


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


def _fitted(module: nn.Module, name: str, tensor: Tensor, where: str) -> Tensor:
    """Return the tensor as HF PEFT has it for a module.

    A 1x1 conv factor of a linear layer becomes a matrix, and a matrix of a conv a 1x1 factor; the magnitudes of a
    linear layer become a vector, those of a conv [1, out, 1, ...].

    Raises:
        PeftfxError: the magnitudes are not one for each output.
    """
    linear = isinstance(module, nn.Linear)
    if name != MAGNITUDE:
        of_module = tensor[:, :, 0, 0] if linear and tensor.ndim == 4 else tensor
        if isinstance(module, nn.Conv2d) and tensor.ndim == 2 and name in (DOWN, UP):
            of_module = tensor[:, :, None, None]
        return of_module.clone(memory_format=torch.contiguous_format)  # parts of a fused layer share one A
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tensor.numel() != len(weight):
        what = f"magnitudes of the shape {list(tensor.shape)} are not one for each output of this module"
        raise PeftfxError(what, where, "was it trained on this model?")
    return tensor.reshape(-1 if linear else (1, -1, *(1,) * (weight.ndim - 2))).contiguous()
