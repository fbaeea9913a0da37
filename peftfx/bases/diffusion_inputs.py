"""The UNet of a diffusion pipeline: recognise it, and make example inputs for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import first_of


def denoises(model: nn.Module) -> bool:
    """Say whether a model is a conditional denoiser (a pipeline's UNet), by its forward and config."""
    accepted, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    named = {"sample", "timestep", "encoder_hidden_states"} <= set(accepted)
    return (
        named
        and first_of(config, "cross_attention_dim") is not None
        and first_of(config, "addition_embed_type") is None
    )


def denoiser_inputs(model: nn.Module, sizes: Mapping[str, int], random: torch.Generator) -> dict[str, Tensor]:
    """Make example inputs of a denoiser: random latents of the config's size, timesteps and text features."""
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
