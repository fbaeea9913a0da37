"""Turn an image autoencoder into a model of its decoder, as a diffusion pipeline runs it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

LATENTS = "latent_sample"


def decodes_latents(model: nn.Module) -> bool:
    """Say whether a diffusers model has a decoder of latents, by its methods and config."""
    return hasattr(model, "decode") and isinstance(getattr(model.config, "latent_channels", None), int)


def as_latent_decoder(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make an autoencoder take `latent_sample` [batch, channels, height, width], and return `sample`.

    The result is the same object, and its modules keep their paths. The encoder's modules do not run.

    Returns:
        The model, and example inputs. Their latents are small; other heights and widths are possible.
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
