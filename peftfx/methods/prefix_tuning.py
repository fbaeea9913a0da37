"""Prefix tuning: trained keys and values ahead of the text's in every layer (Li and Liang 2021, arXiv:2101.00190).

The prefix is `[num_virtual_tokens, 2 * num_layers * token_dim]`: for each virtual token a layer's keys and then its
values, layer after layer, as attention takes them (keys are behind their rotation). With `prefix_projection` a network
makes it in training; files hold what it made, and merging computes it once. In an encoder-decoder the decoder's
self-attention has the prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.prompt_networks import EMBEDDING, embedding, layer, perceptron
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT, SequenceMethod, encodes_and_decodes, prefix, submodules_of
from peftfx.errors import PeftfxError
from peftfx.sites.site import SequenceSite
from peftfx.views.entry import Entry
from peftfx.views.prefix import cache_shape

_TRANSFORM = ("transform_0", "transform_2")


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(SequenceMethod):
    """Keys and values of virtual tokens in every layer.

    Args:
        prefix_projection: make the prefix by a network: an embedding, and two linear layers with a tanh between.
        encoder_hidden_size: width of that network; by default `token_dim`.
        init_weights: "zero" starts with keys and values of 0; by default they are random.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise PeftfxError(f"unknown start {self.init_weights!r}", "init_weights", "None (random) or 'zero'")
        if (self.encoder_hidden_size or 1) < 1:
            raise PeftfxError("an encoder of this size cannot be made", "encoder_hidden_size", "1 or more")

    def sized(self, base: nn.Module, site: SequenceSite) -> PrefixTuning:
        layers, heads, features = cache_shape(base, encodes_and_decodes(base))
        sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * features}
        for name, size in sizes.items():
            if getattr(self, name) not in (None, size):
                what = f"the model keeps keys and values of {name} {size}, not {getattr(self, name)}"
                raise PeftfxError(what, name, f"leave {name} out")
        return dataclasses.replace(
            self,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * features,
            encoder_hidden_size=self.encoder_hidden_size or heads * features,
            num_transformer_submodules=self.num_transformer_submodules or submodules_of(base),
        )

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

    def saved_shape(self) -> tuple[int, ...]:
        assert self.num_layers is not None
        assert self.token_dim is not None
        return self.num_virtual_tokens, self.num_layers * 2 * self.token_dim

    def virtual(self, p: Params, training: bool) -> Tensor:
        assert self.num_layers is not None
        table = self.saved(p, training)
        if self.submodules == 1:
            return table
        # HF PEFT doubles the table and gives each layer four parts of it, of which self-attention takes the first two.
        parts = table.chunk(2 * self.num_layers, 1)
        taken = [(4 * i + j) % len(parts) for i in range(self.num_layers) for j in (0, 1)]
        return torch.cat([parts[i] for i in taken], 1)

    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        return prefix(self.num_virtual_tokens, base, site)
