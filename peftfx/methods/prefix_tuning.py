"""Prefix tuning: trained keys and values before those of the text in each layer (Li and Liang 2021, arXiv:2101.00190).

The prefix is `[num_virtual_tokens, 2 * num_layers * token_dim]`: for each virtual token and each layer the keys and
then the values, as attention uses them (keys after their rotation). With `prefix_projection` a network computes the
prefix in training; files hold the result, and merging computes it once. In an encoder-decoder the decoder's
self-attention has the prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.prefix import PrefixMethod
from peftfx.contract.common.prompt_networks import EMBEDDING, embedding, layer, perceptron
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT
from peftfx.errors import PeftfxError
from peftfx.sites.site import SequenceSite

_TRANSFORM = ("transform_0", "transform_2")


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Trained keys and values of virtual tokens in every layer.

    Args:
        prefix_projection: whether a network computes the prefix: an embedding, and two linear layers with a tanh
            between them.
        encoder_hidden_size: the width of that network; by default `token_dim`.
        init_weights: "zero" starts with keys and values of 0; by default they are random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PrefixTuning(num_virtual_tokens=20))
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.encoder_hidden_size or 1) < 1:
            raise PeftfxError("an encoder of this size cannot be made", "encoder_hidden_size", "1 or more")

    def sized(self, base: nn.Module, site: SequenceSite) -> PrefixTuning:
        sized = super().sized(base, site)
        return dataclasses.replace(sized, encoder_hidden_size=sized.encoder_hidden_size or sized.token_dim)

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight = embed.weight
        assert isinstance(weight, Tensor)
        count, width = self.saved_shape()
        like = torch.empty((count, width), dtype=adapter_dtype(weight.dtype), device=weight.device)
        if not self.prefix_projection:
            return {PROMPT: torch.zeros_like(like) if self.init_weights == "zero" else like.normal_(generator=rng)}
        assert self.token_dim is not None
        assert self.encoder_hidden_size is not None
        p = embedding(like[:, : self.token_dim], rng)
        p |= layer(_TRANSFORM[0], self.token_dim, self.encoder_hidden_size, like, rng)
        p |= layer(_TRANSFORM[1], self.encoder_hidden_size, width, like, rng)
        if self.init_weights == "zero":
            p |= {name: torch.zeros_like(t) for name, t in p.items() if name.startswith(_TRANSFORM[1])}
        return p

    def saved(self, p: Params, training: bool = False) -> Tensor:
        return p[PROMPT] if PROMPT in p else perceptron(_TRANSFORM, p, p[EMBEDDING], torch.tanh)
