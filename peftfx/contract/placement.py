"""Placements: a method at a site, with a class for each family of methods."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.contract.attention import AttentionMethod, key_weight
from peftfx.contract.completeness import asking, refuse_parameters
from peftfx.contract.kept import kept_name
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.override import SAVED, Override, OverrideMethod
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.sequence import SequenceMethod
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sharding.parts import full
from peftfx.sites.blocks import Block, part_site, turned
from peftfx.sites.site import ATTENTION, SEQUENCE, HeadedSite, Part, PatternSite, SequenceSite, Site, WeightSite


@dataclass(frozen=True)
class Placement(ABC):
    """A method at a site."""

    method: Method
    site: Site

    @property
    @abstractmethod
    def key(self) -> str:
        """The name under which the adapter keeps the placement's parameters."""

    @property
    def view(self) -> Site:
        """The site as the method sees it."""
        return self.site

    @property
    def copies(self) -> tuple[Override, ...]:
        """The tensors of the base that the method trains copies of at this site."""
        return ()

    @property
    def known_as(self) -> str:
        """HF PEFT's path of the place, if that is the path of another module: a tied embedding's. Else empty."""
        return ""

    @property
    def on_weight(self) -> WeightPlacement | None:
        """This placement, if its effect can be folded into a weight; else None."""
        return None

    @abstractmethod
    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        """Return new parameters for this place in the base module, without its copies.

        Raises:
            PeftfxError: the method's `init` or `keys` does not give what the contract says.
        """

    @abstractmethod
    def suffixes(self) -> dict[str, str]:
        """Return the suffix in a HF PEFT checkpoint of each parameter that is saved."""

    def file_suffixes(self) -> dict[str, str]:
        """Return the suffix in a HF PEFT checkpoint of each tensor that the file has."""
        return self.suffixes()

    def whole(self, base: nn.Module, group: Mapping[Self, Params]) -> tuple[Method, Params]:
        """Return a method and parameters that do at the whole site what the placements of `group` do there.

        Args:
            base: the base module.
            group: all placements of a rule at this site, including this one, with all tensors that the adapter keeps of
                each.
        """
        return self.method, group[self]


@dataclass(frozen=True)
class WeightPlacement(Placement):
    """A method at a site with a weight, or at one part of a fused weight."""

    method: WeightMethod
    site: WeightSite
    part: Part | None = None

    @property
    def key(self) -> str:
        """The name for the site's path, followed by the last word of the part's role."""
        name = kept_name(self.site.path)
        return name if self.part is None else f"{name}.{self.part.role.rpartition('.')[2]}"

    @property
    def block(self) -> Block | None:
        """The rows of the part, or None for the whole weight."""
        return None if self.part is None else Block.of(self.part, self.site.rows)

    @property
    def view(self) -> Site:
        return self.site if self.part is None else part_site(self.site, self.part, self.block)  # type: ignore[arg-type]

    @property
    def on_weight(self) -> WeightPlacement | None:
        return None if self.method.unfoldable else self

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        with asking(self.method, "init", self.site.path):
            with unset_fake_temporarily():  # views of real tensors stay real where new tensors are fake
                own = self.base(*whole_tensors(base, self.site))
            try:
                params = self.method.init(self.view, own, rng)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                why = str(error) if own.weight.isfinite().all() else "it holds NaN or an infinity"
                what = f"torch cannot decompose this weight, as {type(self.method).__name__} needs to start: {why}"
                raise PeftfxError(what, self.site.path, "check the base's weights") from error
            more = self.method.start(self.view, own, shared or {}, rng)
            params = {**params, **more} if more else params
        refuse_parameters(self.method, self.site.path, params, self._suffixes_at(self.view), beside=shared or ())
        return params

    def suffixes(self) -> dict[str, str]:
        return self._suffixes_at(self.site)

    def _suffixes_at(self, site: Site) -> dict[str, str]:
        """Return the suffixes for the whole site, as in files, or for the part, which may differ."""
        with asking(self.method, "keys", self.site.path):
            return self.method.keys(site)

    def file_suffixes(self) -> dict[str, str]:
        return self.method.file_keys(self.site)

    def base(self, weight: Tensor, bias: Tensor | None) -> Base:
        """Return the tensors as the method sees them: [out, in] or [experts, out, in], only the part's rows."""
        return part_of(Base(turned(weight, self.site.transposed), bias), self.block, self.site.rows_axis)

    def whole(self, base: nn.Module, group: Mapping[Self, Params]) -> tuple[WeightMethod, Params]:
        if self.part is None:
            return self.method.written(group[self])
        written = {p.part.rows: p.method.written(params) for p, params in group.items() if p.part is not None}
        method, _ = next(iter(written.values()))
        tensors = dataclasses.replace(self, part=None).base(*site_tensors(base, self.site))
        return method.whole(self.site, tensors, {rows: p for rows, (_, p) in written.items()})


@dataclass(frozen=True)
class AttentionPlacement(Placement):
    """A method at an attention."""

    method: AttentionMethod
    site: HeadedSite

    @property
    def key(self) -> str:
        """The name for the attention's module, or `ATTENTION` where the base itself computes the attention."""
        return kept_name(self.site.path) or ATTENTION

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        with asking(self.method, "init", self.site.path):
            params = self.method.init(self.site, full(key_weight(base, self.site)), rng)
        refuse_parameters(self.method, self.site.path, params, self.suffixes())
        return params

    def suffixes(self) -> dict[str, str]:
        with asking(self.method, "keys", self.site.path):
            return self.method.keys(self.site)


@dataclass(frozen=True)
class SequencePlacement(Placement):
    """A soft prompt before the text. Its file has the computed prompt, and none of its parameters."""

    method: SequenceMethod
    site: SequenceSite

    @property
    def key(self) -> str:
        """`SEQUENCE`, as there is only one stream of tokens."""
        return SEQUENCE

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        with asking(self.method, "init", self.site.path):
            params = self.method.init(self.site, base.get_submodule(self.site.embedding), rng)
        refuse_parameters(self.method, self.site.path, params)
        return params

    def suffixes(self) -> dict[str, str]:
        return {name: name for name in self.method.written_shapes()}


@dataclass(frozen=True)
class PatternPlacement(Placement):
    """A method at a match of a pattern."""

    method: PatternMethod
    site: PatternSite

    @property
    def key(self) -> str:
        """The name for the site's path."""
        return kept_name(self.site.path)

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        first = next((p.detach() for p in base.parameters() if p.is_floating_point()), torch.empty(0))
        like = torch.empty(0, dtype=first.dtype, device=first.device)
        with asking(self.method, "init", self.site.path):
            params = self.method.init(self.site, like, rng)
        refuse_parameters(self.method, self.site.path, params, self.suffixes())
        return params

    def suffixes(self) -> dict[str, str]:
        with asking(self.method, "keys", self.site.path):
            return self.method.keys(self.site)


@dataclass(frozen=True)
class OverridePlacement(Placement):
    """A method that trains copies of the tensors of a site's module."""

    method: OverrideMethod
    copies: tuple[Override, ...] = ()
    known_as: str = ""

    @property
    def key(self) -> str:
        """The adapter's folder of the copies."""
        return f"{SAVED}.{self.site.path}"

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        return {}

    def suffixes(self) -> dict[str, str]:
        names = (override.key.rpartition(".")[2] for override in self.copies)
        return {name: self.method.suffix(name) for name in names}


def part_of(base: Base, block: Block | None, axis: int) -> Base:
    """Return only the block's rows of a weight, along `axis`, and of its bias; all rows if there is no block."""
    if block is None:
        return base
    return Base(block.take(base.weight, axis), None if base.bias is None else block.take(base.bias, 0))


def whole_tensors(base: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """Return a site's whole weight and bias, gathered where each process has only a part of them."""
    weight, bias = site_tensors(base, site)
    return full(weight), None if bias is None else full(bias)


def site_tensors(base: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """Return a site's weight, in its stored layout, and its bias from the base module."""
    weight = getattr(*owner_of(base, site.weight.partition(".")[2]))
    bias = None if site.bias is None else getattr(*owner_of(base, site.bias.partition(".")[2]))
    return weight, bias


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that holds the tensor of this dotted name, and the last part of the name."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
