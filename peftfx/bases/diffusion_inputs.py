"""The denoisers of diffusion pipelines (U-Nets, ControlNets, transformers): recognise them, and make example inputs.

diffusers' models name the arguments of their forward alike, and the fields of their configs too. So an argument is made
from the fields that its name stands for, and no class has to be known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import first_of, number_of
from peftfx.bases.dtypes import floating_dtype

_IMAGE = ("sample", "hidden_states")  #: names of the noisy latents: of U-Nets, and of transformers
_PACKED = (4, 6)  #: height and width, in tokens, of latents that a model takes as a sequence of tokens
#: Fields with the width of the text's features, the most specific first: some models name an inner width as well.
_TEXT_WIDTHS = (
    *("encoder_hid_dim", "caption_channels", "joint_attention_dim", "text_embed_dim", "cap_feat_dim"),
    "cross_attention_dim",
)
_TIMES = 6  #: the numbers in SDXL's `time_ids`: original size, crop, target size


def denoises(model: nn.Module) -> bool:
    """Say whether a model is a denoiser of diffusers, by its forward and config."""
    accepted, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    return isinstance(config, Mapping) and "timestep" in accepted and any(name in accepted for name in _IMAGE)


def denoiser_inputs(model: nn.Module, sizes: Mapping[str, int], random: torch.Generator) -> dict[str, Tensor]:
    """Make example inputs of a denoiser: random latents of the config's size, timesteps, and what they depend on.

    A U-Net's timesteps are integers, as schedulers of noise give them. A transformer's are floating-point numbers, of
    which integers are some. `added_cond_kwargs` is a dict of tensors, of the models that take it.

    Args:
        model: the denoiser.
        sizes: the sizes `batch` and `sequence`, the length of the text.
        random: the source of the values.
    """
    with unset_fake_temporarily(), torch.device("cpu"):
        maker = _Maker(model, sizes["batch"], sizes["sequence"], random)
        made = {name: getattr(maker, name)() for name in maker.accepted if hasattr(_Maker, name)}
    return {name: value for name, value in made.items() if value is not None}


@dataclass
class _Maker:
    """Makes arguments: each method makes that of its name, or None if the model does not need it."""

    model: nn.Module
    batch: int
    length: int
    random: torch.Generator

    def __post_init__(self) -> None:
        self.accepted = inspect.signature(self.model.forward).parameters
        self.config: Any = self.model.config
        self.dtype = floating_dtype(self.model)

    def sample(self) -> Tensor:
        return self._latents()

    def hidden_states(self) -> Tensor:
        if "img_ids" in self.accepted:
            return self._floats(math.prod(_PACKED), number_of(self.config, "in_channels", 4))
        return self._latents()

    def timestep(self) -> Tensor:
        if "sample" in self.accepted:
            return torch.randint(1000, (self.batch,), generator=self.random)
        return torch.rand(self.batch, generator=self.random).to(self.dtype)  # some multiply it by 1000 themselves

    def encoder_hidden_states(self) -> Tensor | None:
        width = first_of(self.config, *_TEXT_WIDTHS)
        width = max(width) if isinstance(width, list | tuple) else width
        return self._floats(self.length, width) if isinstance(width, int) else None

    def encoder_attention_mask(self) -> Tensor | None:
        needed = self.accepted["encoder_attention_mask"].default is inspect.Parameter.empty
        return torch.ones(self.batch, self.length, dtype=torch.long) if needed else None

    def pooled_projections(self) -> Tensor | None:
        width = first_of(self.config, "pooled_projection_dim")
        return self._floats(width) if isinstance(width, int) else None

    def class_labels(self) -> Tensor | None:
        classes = first_of(self.config, "num_class_embeds", "num_embeds_ada_norm")
        plain = first_of(self.config, "class_embed_type") is None and first_of(self.config, "caption_channels") is None
        if not isinstance(classes, int) or not plain:
            return None
        return torch.randint(classes, (self.batch,), generator=self.random)

    def guidance(self) -> Tensor | None:
        return self._floats().abs() if first_of(self.config, "guidance_embeds") else None

    def img_ids(self) -> Tensor:
        ids = torch.zeros(math.prod(_PACKED), self._position_axes())
        rows, columns = torch.arange(_PACKED[0]), torch.arange(_PACKED[1])
        ids[:, -2:] = torch.cartesian_prod(rows, columns).to(ids.dtype)
        return ids.to(self.dtype)

    def txt_ids(self) -> Tensor:
        return torch.zeros(self.length, self._position_axes(), dtype=self.dtype)

    def controlnet_cond(self) -> Tensor:
        """Make an image: the model makes it as small as the latents by one convolution for each step of widths."""
        height, width = self._side()
        widths = first_of(self.config, "conditioning_embedding_out_channels")
        scale = 2 ** (len(widths) - 1) if isinstance(widths, list | tuple) else 8
        return self._floats(number_of(self.config, "conditioning_channels", 3), scale * height, scale * width)

    def added_cond_kwargs(self) -> dict[str, Tensor] | None:
        if first_of(self.config, "addition_embed_type") == "text_time":
            times = _TIMES * number_of(self.config, "addition_time_embed_dim", 256)
            width = number_of(self.config, "projection_class_embeddings_input_dim", times + 1) - times
            return {"text_embeds": self._floats(width), "time_ids": 64 * self._floats(_TIMES).abs()}
        if getattr(self.model, "use_additional_conditions", False):
            return {"resolution": 64 * self._floats(2).abs(), "aspect_ratio": self._floats(1).abs()}
        return None

    def original_size(self) -> Tensor:
        return 64 * self._floats(2).abs()

    target_size = crop_coords = original_size

    def _latents(self) -> Tensor:
        return self._floats(number_of(self.config, "in_channels", 4), *self._side())

    def _side(self) -> tuple[int, int]:
        side = first_of(self.config, "sample_size") or 64
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return int(str(height)), int(str(width))

    def _position_axes(self) -> int:
        axes = first_of(self.config, "axes_dims_rope")
        return len(axes) if isinstance(axes, list | tuple) else 3

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.random).to(self.dtype)
