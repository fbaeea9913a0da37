"""Derived weights: expressions over tensors of base and adapter, evaluated at once or one at a time when written."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.completeness import asking, refuse_fold
from peftfx.contract.method import Base
from peftfx.contract.placement import part_of
from peftfx.contract.weight import WeightMethod, widened
from peftfx.graph.lazy_weights import exact
from peftfx.graph.recipe import Get, Recipe
from peftfx.memory.pages import page_tensor
from peftfx.sites.blocks import Block, turned
from peftfx.sites.site import Site


class Folded(Protocol):
    """A change of a layer's weight and bias, with the names of the tensors in the graph that the change reads."""

    @property
    def params(self) -> Mapping[str, str]: ...

    @property
    def by_row(self) -> frozenset[str] | None:
        """The tensors that have a row for each row of the weight, if each row changes by itself. None if it does not.

        Then `fold` may be called with some rows of the weight and the bias, and with the same rows of these tensors.
        """
        ...

    def fold(self, start: Base, base: Base, get: Get) -> Base:
        """Return the changed weight and bias, given those before the first change (`start`) and now (`base`)."""
        ...


@dataclass(frozen=True)
class RecipeStep:
    """One method at a site, or at a part of a fused site, with the names of its parameters in the graph."""

    method: WeightMethod
    site: Site
    block: Block | None
    params: Mapping[str, str]

    @property
    def by_row(self) -> frozenset[str] | None:
        names = None if self.block is not None else self.method.by_row(self.site)
        return None if names is None else frozenset(self.params[name] for name in names & self.params.keys())

    def fold(self, start: Base, base: Base, get: Get) -> Base:
        """Return the weight and bias after this step, given those before the first step (`start`) and now (`base`)."""
        p = widened({name: get(target) for name, target in self.params.items()})
        if self.block is None:
            return self._over(start, base, p)
        axis = self.site.rows_axis
        now = part_of(base, self.block, axis)
        bias = now.bias
        new = self._over(now if start is base else part_of(start, self.block, axis), now, p)
        whole = base.bias
        if new.bias is not bias and new.bias is not None:
            whole = self.block.put(base.weight.new_zeros(base.weight.shape[0]) if whole is None else whole, new.bias, 0)
        return Base(self.block.put(base.weight, new.weight, axis), whole)

    def _over(self, start: Base, now: Base, p: Mapping[str, Tensor]) -> Base:
        """Return what the method makes of a weight, as the first step or after other steps."""
        with asking(self.method, "fold", self.site.path):
            alone, method = start is now, self.method
            made = method.fold(self.site, now, p) if alone else method.fold_over(self.site, start, now, p)
        refuse_fold(self.method, self.site.path, made, now.weight, self.site.groups)
        return Base(*made)


@dataclass(frozen=True)
class Rounding:
    """The error of a merged weight that was rounded to the base's dtype.

    Attributes:
        max_abs: the largest absolute difference of an element from its value in fp32.
        max_rel: `max_abs` relative to the weight's largest magnitude.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0

    @staticmethod
    def of(rounded: Tensor, exact: Tensor) -> Rounding:
        """Return the rounding error between two tensors, a few rows at a time; zero if they have one dtype."""
        errors = _Errors()
        if rounded.dtype != exact.dtype and not _is_blank(rounded) and exact.numel():
            rows = _rows_at_once(exact)
            for new, old in zip(rounded.split(rows), exact.split(rows), strict=True):
                errors.add(new, old)
        return errors.rounding

    def __str__(self) -> str:
        return f"{self.max_abs:.1e} ({self.max_rel:.1e} of the largest value)"


@dataclass
class _Errors:
    """The largest error, and the largest magnitude, of the pieces of a weight so far."""

    error: float = 0.0
    largest: float = 0.0

    def add(self, rounded: Tensor, exact: Tensor) -> None:
        self.error = max(self.error, _magnitude(rounded.to(exact.dtype).sub_(exact)))
        self.largest = max(self.largest, _magnitude(exact))

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.error, self.error / self.largest if self.error else 0.0)


def _magnitude(tensor: Tensor) -> float:
    return max(-float(tensor.amin()), float(tensor.amax()))  # each faster than torch.aminmax


_AT_ONCE = 1 << 17  #: how many numbers are folded or compared at a time, so that they stay in the cache


def _rows_at_once(tensor: Tensor) -> int:
    return max(1, _AT_ONCE * len(tensor) // tensor.numel())


def _is_blank(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@dataclass(frozen=True)
class Folding:
    """The merged form of an adapted site: the names of its base's tensors, and the steps that change them."""

    site: Site
    weight: str
    bias: str | None
    steps: tuple[Folded, ...]

    @torch.no_grad()
    def evaluate(self, get: Get) -> Base:
        """Return the new weight, in the base's layout, and bias: computed in fp32, rounded once to the base's dtype."""
        return self.measure(get)[0]

    @torch.no_grad()
    def measure(self, get: Get) -> tuple[Base, Rounding]:
        """Return the result of `evaluate`, and the rounding error of the weight."""
        weight, bias = get(self.weight), None if self.bias is None else get(self.bias)
        stored = exact(weight)
        if self._goes_by_rows(stored, weight.dtype):
            return self._by_rows(weight, bias, get)
        seen = turned(stored, self.site.transposed)
        base = Base(seen.float(), None if bias is None else exact(bias).float())
        start = base
        for step in self.steps:
            base = step.fold(start, base, get)
        new = base.weight.to(weight.dtype)
        rounding = Rounding.of(new, base.weight)
        new = turned(new, self.site.transposed).contiguous()
        if base.bias is None or base.bias is start.bias:
            return Base(new, bias), rounding  # the same object: so callers see that the bias did not change
        return Base(new, base.bias.to(weight.dtype if bias is None else bias.dtype)), rounding

    def _goes_by_rows(self, stored: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a few rows at a time are folded, so that they stay in the cache from cast to cast."""
        casts = {stored.dtype, dtype} != {torch.float32} and stored.device.type == "cpu"
        plain = type(stored) in (Tensor, nn.Parameter) and not self.site.transposed and stored.numel() > _AT_ONCE
        return casts and plain and all(step.by_row is not None for step in self.steps)

    def _by_rows(self, weight: Tensor, bias: Tensor | None, get: Get) -> tuple[Base, Rounding]:
        """Return the result of `measure` without a tensor of the weight's size in fp32."""
        stored, wide = exact(weight), None if bias is None else exact(bias).float()
        read = widened({target: get(target) for step in self.steps for target in step.params.values()})
        new, new_bias, errors = page_tensor(stored.shape, weight.dtype), list[Tensor](), _Errors()
        count = _rows_at_once(stored)
        for rows in (slice(first, first + count) for first in range(0, len(stored), count)):
            start = base = Base(stored[rows].float(), None if wide is None else wide[rows])
            for step in self.steps:
                base = step.fold(start, base, _of_rows(read, step.by_row or (), rows))
            new[rows] = base.weight
            if new.dtype != base.weight.dtype:
                errors.add(new[rows], base.weight)
            if base.bias is not None and base.bias is not start.bias:
                new_bias.append(base.bias)
        if new_bias:
            bias = torch.cat(new_bias).to(weight.dtype if bias is None else bias.dtype)
        return Base(new, bias), errors.rounding

    def targets(self) -> list[str]:
        """Return the names of all tensors that the folding reads."""
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [target for step in self.steps for target in step.params.values()]


def _of_rows(read: Mapping[str, Tensor], by_row: Container[str], rows: slice) -> Get:
    return lambda target: read[target][rows] if target in by_row else read[target]


@dataclass(frozen=True)
class Own:
    """A recipe that puts an adapter's own tensor in place of the base's."""

    target: str

    def evaluate(self, get: Get) -> Tensor:
        """Return the adapter's tensor."""
        return get(self.target).detach()


@dataclass(frozen=True)
class Derived:
    """A recipe for one tensor of a folding: the weight or the bias."""

    folding: Folding
    output: Literal["weight", "bias"]

    tell: Callable[[str, Rounding], object] | None = field(default=None, compare=False, repr=False)
    """Called at each evaluation with the site's path and the rounding error."""

    def evaluate(self, get: Get) -> Tensor:
        """Return the tensor's value; `get` reads the graph's tensors by name."""
        base, rounding = self.folding.measure(get)
        if self.tell is not None:
            self.tell(self.folding.site.path, rounding)
        value = getattr(base, self.output)
        assert isinstance(value, Tensor)
        return value


def foldings(recipes: Iterable[Recipe]) -> dict[str, Folding]:
    """Return the foldings among the recipes, by the paths of their sites."""
    return {r.folding.site.path: r.folding for r in recipes if isinstance(r, Derived)}
