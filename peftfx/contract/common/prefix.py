"""PrefixMethod: the base class of methods that put keys and values before those of the text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from peftfx.contract.method import Params
from peftfx.contract.sequence import SequenceMethod, encodes_and_decodes, prefix, submodules_of
from peftfx.errors import PeftfxError
from peftfx.sites.site import SequenceSite
from peftfx.views.entry import Entry
from peftfx.views.prefix import cache_shape


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(SequenceMethod):
    """A table [num_virtual_tokens, 2 * num_layers * token_dim]: each layer's keys and then its values."""

    def sized(self, base: nn.Module, site: SequenceSite) -> Self:
        layers, heads, features = cache_shape(base, encodes_and_decodes(base))
        sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * features}
        for name, size in sizes.items():
            if getattr(self, name) not in (None, size):
                what = f"the keys and values of the model have {name}={size}, not {getattr(self, name)}"
                raise PeftfxError(what, name, f"leave {name} out")
        return dataclasses.replace(
            self,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * features,
            num_transformer_submodules=self.num_transformer_submodules or submodules_of(base),
        )

    def apart_from_peft(self, base: nn.Module, site: SequenceSite) -> str:
        if self.submodules != 1 or not encodes_and_decodes(base):
            return ""
        return (
            "with num_transformer_submodules=1 its prefix is a cache without a part for the encoder's text, so each "
            "cross-attention also attends to the prefix and to the decoder's text. Here only the decoder's "
            "self-attention has the prefix, as with num_transformer_submodules=2"
        )

    def saved_shape(self) -> tuple[int, ...]:
        assert self.num_layers is not None
        assert self.token_dim is not None
        return self.num_virtual_tokens, self.num_layers * 2 * self.token_dim

    def virtual(self, p: Params, training: bool) -> Tensor:
        assert self.num_layers is not None
        table = self.saved(p, training)
        if self.submodules == 1:
            return table
        # HF PEFT doubles the table and gives each layer four parts. Self-attention uses the first two of them.
        parts = table.chunk(2 * self.num_layers, 1)
        taken = [(4 * i + j) % len(parts) for i in range(self.num_layers) for j in (0, 1)]
        return torch.cat([parts[i] for i in taken], 1)

    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        return prefix(self.num_virtual_tokens, base, site)
