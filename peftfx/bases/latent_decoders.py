"""Autoencoders of images, of which a diffusion pipeline runs the decoder: a model of latents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

LATENTS = "latent_sample"


def decodes_latents(model: nn.Module) -> bool:
    """Whether a model of diffusers has a decoder of latents, by what it and its config have."""
    return hasattr(model, "decode") and isinstance(getattr(model.config, "latent_channels", None), int)


def as_latent_decoder(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make of an autoencoder a model that takes `latent_sample` [batch, channels, height, width], and gives `sample`.

    It is the same object, and its modules keep their paths; the encoder's do not run.

    Returns:
        The model, and a call of it. Latents are small here; heights and widths are free.
    """
    kind = type(model)

    def forward(self: Any, latent_sample: Tensor) -> dict[str, Tensor]:
        return {"sample": self.decode(latent_sample, return_dict=False)[0]}

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", LATENTS)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    channels = int(model.config.latent_channels)  # type: ignore[union-attr, arg-type]
    dtype = next(p.dtype for p in model.parameters())
    random = torch.Generator().manual_seed(0)
    return model, {LATENTS: torch.randn(2, channels, 6, 8, generator=random).to(dtype)}
