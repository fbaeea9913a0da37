"""Derived weights: expressions over base and adapter tensors, evaluated now or one by one as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.completeness import asking, refuse_fold
from peftfx.contract.method import Base
from peftfx.contract.weight import WeightMethod, widened
from peftfx.graph.lazy_weights import exact
from peftfx.graph.recipe import Get, Recipe
from peftfx.sites.blocks import Block, turned
from peftfx.sites.site import Site


class Folded(Protocol):
    """What is done to the weight and bias of a layer, with the names of the tensors in the graph that it reads."""

    @property
    def params(self) -> Mapping[str, str]: ...

    def fold(self, start: Base, base: Base, get: Get) -> Base:
        """The weight and bias after it, of what they were at the start and are now."""
        ...


@dataclass(frozen=True)
class RecipeStep:
    """One method applied at a site, or at a part of a fused one, with the names of its parameters in the graph."""

    method: WeightMethod
    site: Site
    block: Block | None
    params: Mapping[str, str]

    def fold(self, start: Base, base: Base, get: Get) -> Base:
        """The weight and bias after this step, of what they were at the start and are now."""
        p = widened({name: get(target) for name, target in self.params.items()})
        if self.block is None:
            return self._over(start, base, p)
        now = self._rows(base)
        bias = now.bias
        new = self._over(now if start is base else self._rows(start), now, p)
        whole = base.bias
        if new.bias is not bias and new.bias is not None:
            whole = self.block.put(base.weight.new_zeros(base.weight.shape[0]) if whole is None else whole, new.bias, 0)
        return Base(self.block.put(base.weight, new.weight, self.site.rows_axis), whole)

    def _over(self, start: Base, now: Base, p: Mapping[str, Tensor]) -> Base:
        """What the method makes of a weight, alone or over what acts there already."""
        with asking(self.method, "fold", self.site.path):
            alone, method = start is now, self.method
            made = method.fold(self.site, now, p) if alone else method.fold_over(self.site, start, now, p)
        refuse_fold(self.method, self.site.path, made, now.weight, self.site.groups)
        return Base(*made)

    def _rows(self, base: Base) -> Base:
        assert self.block is not None
        weight = self.block.take(base.weight, self.site.rows_axis)
        return Base(weight, None if base.bias is None else self.block.take(base.bias, 0))


@dataclass(frozen=True)
class Rounding:
    """What a merged weight lost when it was rounded to the base's dtype.

    Attributes:
        max_abs: the largest difference from its value in fp32.
        max_rel: the same, relative to the weight's largest magnitude.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0

    @staticmethod
    def of(rounded: Tensor, exact: Tensor) -> Rounding:
        """The rounding between two tensors, a few rows in memory at a time; none where the dtype is one."""
        if rounded.dtype == exact.dtype or rounded.is_meta or isinstance(rounded, FakeTensor) or not exact.numel():
            return Rounding()
        pairs = zip(rounded.split(_ROWS), exact.split(_ROWS), strict=True)
        largest = max(float((new.to(old.dtype) - old).abs().max()) for new, old in pairs)
        low, high = (abs(float(end)) for end in exact.aminmax())
        return Rounding(largest, largest / max(low, high, torch.finfo(exact.dtype).tiny))

    def __str__(self) -> str:
        return f"{self.max_abs:.1e} ({self.max_rel:.1e} of the largest value)"


_ROWS = 1024


@dataclass(frozen=True)
class Folding:
    """The weight-space form of an adapted site: the tensors of its base and the steps over them."""

    site: Site
    weight: str
    bias: str | None
    steps: tuple[Folded, ...]

    @torch.no_grad()
    def evaluate(self, get: Get) -> Base:
        """The new weight, stored as the base's is, and bias: computed in fp32, rounded once to the base's dtype."""
        return self.measure(get)[0]

    @torch.no_grad()
    def measure(self, get: Get) -> tuple[Base, Rounding]:
        """What `evaluate` gives, and what rounding took from the weight."""
        weight, bias = get(self.weight), None if self.bias is None else get(self.bias)
        stored = exact(weight)
        seen = turned(stored, self.site.transposed)
        base = Base(seen.float(), None if bias is None else exact(bias).float())
        start = base
        for step in self.steps:
            base = step.fold(start, base, get)
        new = base.weight.to(weight.dtype)
        rounding = Rounding.of(new, base.weight)
        new = turned(new, self.site.transposed).contiguous()
        if base.bias is None or base.bias is start.bias:
            return Base(new, bias), rounding  # the very tensor: this is how callers see that it did not change
        return Base(new, base.bias.to(weight.dtype if bias is None else bias.dtype)), rounding

    def targets(self) -> list[str]:
        """The names of all tensors it reads."""
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [target for step in self.steps for target in step.params.values()]


@dataclass(frozen=True)
class Own:
    """An adapter's own tensor in the place of the base's: the recipe that copies."""

    target: str

    def evaluate(self, get: Get) -> Tensor:
        """The adapter's tensor."""
        return get(self.target).detach()


@dataclass(frozen=True)
class Derived:
    """One tensor of a folding."""

    folding: Folding
    output: Literal["weight", "bias"]

    tell: Callable[[str, Rounding], object] | None = field(default=None, compare=False, repr=False)
    """Called, when it is evaluated, with the site's path and what rounding took."""

    def evaluate(self, get: Get) -> Tensor:
        """Its value now, given how to read the graph's tensors."""
        base, rounding = self.folding.measure(get)
        if self.tell is not None:
            self.tell(self.folding.site.path, rounding)
        value = getattr(base, self.output)
        assert isinstance(value, Tensor)
        return value


def foldings(recipes: Iterable[Recipe]) -> dict[str, Folding]:
    """The foldings among recipes, by the path of their site."""
    return {r.folding.site.path: r.folding for r in recipes if isinstance(r, Derived)}
