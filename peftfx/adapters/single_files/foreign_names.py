"""Names of modules that are another library's: diffusers knows which of its own modules they mean.

kohya's trainer has the modules of SDXL, Flux and others by the names of the models' first publishers. The pipelines of
diffusers rename the tensors of such files, and cut those of fused layers. A magnitude of DoRA, which they leave out, is
cut as the B of a LoRA of rank 1 would be: both have one row for each output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.adapters.single_files.keys import SCALE, UP, by_stem
from peftfx.contract.common.lora.dora import MAGNITUDE

_PARTS = ("unet", "transformer")


def renamed(tensors: Mapping[str, Tensor], base: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by the module paths of a denoiser of diffusers; none if diffusers does not know the names."""
    if not type(base).__module__.startswith("diffusers."):
        return {}
    for pipeline, part in _pipelines(type(base)):
        scales = {key: tensor for key, tensor in tensors.items() if key.endswith(SCALE)}
        found = _asked(pipeline, part, base, {key: t for key, t in tensors.items() if key not in scales})
        magnitudes = _asked(pipeline, part, base, dict(_as_loras(scales))) if scales else {}
        for stem, both in magnitudes.items():
            found.setdefault(stem, {})[MAGNITUDE] = both[UP]
        if found and bool(magnitudes) == bool(scales):
            return found
    return {}


def _pipelines(kind: type[nn.Module]) -> Iterator[tuple[Any, str]]:
    """Yield the pipelines of diffusers that have such a denoiser and read LoRAs, and its name in them."""
    from diffusers.pipelines import auto_pipeline

    mappings = [m for name, m in vars(auto_pipeline).items() if name.startswith("AUTO_") and isinstance(m, Mapping)]
    for pipeline in dict.fromkeys(cls for mapping in mappings for cls in mapping.values()):
        taken = inspect.signature(pipeline.__init__).parameters
        for part in _PARTS:
            if part in taken and taken[part].annotation is kind and hasattr(pipeline, "lora_state_dict"):
                yield pipeline, part


def _asked(pipeline: Any, part: str, base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what a pipeline makes of the tensors, for one of its models."""
    options = {"unet_config": base.config} if part == "unet" else {"return_alphas": True}
    try:
        made, alphas = pipeline.lora_state_dict(tensors, **options)
    except Exception:  # names that it does not know are told by any kind of error; the caller tells it in words
        return {}
    named = {**made, **{key: torch.tensor(alpha) for key, alpha in (alphas or {}).items()}}
    return by_stem({key.removeprefix(f"{part}."): t for key, t in named.items() if key.startswith(f"{part}.")})


def _as_loras(scales: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, scale in scales.items():
        stem = key.removesuffix(SCALE)
        yield f"{stem}.lora_down.weight", torch.ones(1, 1)
        yield f"{stem}.lora_up.weight", scale.reshape(-1, 1)
