"""Deliberately wrong methods whose files, or shared tensors, are not what they train; and right ones beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from laws.breakers import Scale, Words
from torch import Tensor, nn

from peftfx.contract.method import Base, Params
from peftfx.contract.sequence import PROMPT
from peftfx.sites.site import Site


@dataclasses.dataclass(frozen=True)
class SharesGains(Scale):
    """A right method of numbers that a rule keeps, of which each place reads its own (`shares`)."""

    peft_type: ClassVar[str] = "SHARES_GAINS"

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {}

    def keys(self, site: Site) -> dict[str, str]:
        return {}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {f"l_{i}": f"base_model.gains.{i}" for i in range(len(sites))}

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        return {f"l_{i}": torch.zeros(()) for i in range(len(sites))}

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        return {"l": f"l_{sites.index(site)}"}

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        gain = 1 + p["l"]
        return Base(base.weight * gain, None if base.bias is None else base.bias * gain)


class SharesByItsTarget(SharesGains):
    """Numbers its places by an option that no file has."""

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        order = list(sites) if self.target else list(sites)[::-1]
        return {"l": f"l_{order.index(site)}"}


@dataclasses.dataclass(frozen=True)
class SavesRoots(Scale):
    """A right method whose files have another tensor than it trains (`file_keys`, `written`, `read`)."""

    peft_type: ClassVar[str] = "SAVES_ROOTS"

    def file_keys(self, site: Site) -> dict[str, str]:
        return {"twice": "scale_twice"}

    def written(self, p: Params) -> tuple[SavesRoots, dict[str, Tensor]]:
        return self, {"twice": 2 * p["l"]}

    def read(self, p: Params) -> dict[str, Tensor]:
        return {"l": p["twice"] / 2}


class ReadsWhatItWrote(SavesRoots):
    """Takes what its file has for what it trains."""

    def read(self, p: Params) -> dict[str, Tensor]:
        return {"l": p["twice"]}


@dataclasses.dataclass(frozen=True)
class Halves(Words):
    """A right prompt of two parameters that its file tells (`split`)."""

    peft_type: ClassVar[str] = "HALVES"
    num_virtual_tokens: int = 4

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return self.split(super().init(site, embed, rng)[PROMPT])

    def saved(self, p: Params, training: bool = False) -> Tensor:
        return torch.cat([p["first"], p["last"]]) if "first" in p else p[PROMPT]

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        return {"first": saved[:2].clone(), "last": saved[2:].clone()}


class SplitsTheOtherWay(Halves):
    """Takes the last words of a file for its first."""

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return Halves.split(self, Words.init(self, site, embed, rng)[PROMPT])

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        return {"first": saved[2:].clone(), "last": saved[:2].clone()}
