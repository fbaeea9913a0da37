"""Cartridges: a trained prefix whose first tokens keep their start values (Eyuboglu et al. 2025, arXiv:2506.06266).

Keys and values of virtual tokens in every layer have the layout of prefix tuning. The first tokens are not trained,
which keeps the model's attention to its first tokens stable. All start at random, as in HF PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.prefix import PrefixMethod
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT
from peftfx.errors import PeftfxError
from peftfx.sites.site import SequenceSite

FROZEN, TRAINED = "frozen_embedding", "trainable_embedding"


@dataclass(frozen=True, kw_only=True)
class Cartridge(PrefixMethod):
    """Keys and values of virtual tokens in every layer, all trained except those of the first tokens.

    Args:
        num_frozen_tokens: how many of the virtual tokens keep their start values.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.Cartridge(num_virtual_tokens=8, num_frozen_tokens=1))
    """

    num_frozen_tokens: int = 1

    peft_type: ClassVar[str] = "CARTRIDGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_frozen_tokens <= self.num_virtual_tokens:
            what = f"{self.num_frozen_tokens} of {self.num_virtual_tokens} virtual tokens cannot be frozen"
            raise PeftfxError(what, "num_frozen_tokens", "0 to num_virtual_tokens")

    def frozen(self) -> frozenset[str]:
        return frozenset({FROZEN})

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight = embed.weight
        assert isinstance(weight, Tensor)
        table = torch.empty(self.saved_shape(), dtype=adapter_dtype(weight.dtype), device=weight.device)
        return self.split(table.normal_(generator=rng))

    def saved(self, p: Params, training: bool = False) -> Tensor:
        return p[PROMPT] if PROMPT in p else torch.cat([p[FROZEN], p[TRAINED]])

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        return {FROZEN: saved[: self.num_frozen_tokens].clone(), TRAINED: saved[self.num_frozen_tokens :].clone()}
