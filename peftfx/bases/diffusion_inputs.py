"""A diffusion pipeline's UNet: how it is known, and what a call of it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import first_of


def denoises(model: nn.Module) -> bool:
    """Whether this is a conditional denoiser, a diffusion pipeline's UNet, by what its forward and config have."""
    accepted, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    named = {"sample", "timestep", "encoder_hidden_states"} <= set(accepted)
    return (
        named
        and first_of(config, "cross_attention_dim") is not None
        and first_of(config, "addition_embed_type") is None
    )


def denoiser_inputs(model: nn.Module, sizes: Mapping[str, int], random: torch.Generator) -> dict[str, Tensor]:
    """Arguments of a call of it: random latents of the config's own size, steps, and a text's features."""
    config, batch = model.config, sizes["batch"]
    side = first_of(config, "sample_size") or 64
    height, width = side if isinstance(side, list | tuple) else (side, side)
    width_of_text = first_of(config, "cross_attention_dim")
    text = max(width_of_text) if isinstance(width_of_text, list | tuple) else width_of_text
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    shape = (batch, int(str(first_of(config, "in_channels"))), int(str(height)), int(str(width)))
    with unset_fake_temporarily(), torch.device("cpu"):
        return {
            "sample": torch.randn(shape, generator=random).to(kind),
            "timestep": torch.randint(1000, (batch,), generator=random),
            "encoder_hidden_states": torch.randn(batch, sizes["sequence"], int(str(text)), generator=random).to(kind),
        }
