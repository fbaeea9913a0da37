"""fit_weights: the weights of a model rounded by GPTQ, in one call of the model on a text.

The model's own code runs once, on all of the text. Ahead of each layer its inputs are there, so its weight is rounded
then, and the layer's outputs become those of the rounded weight: what comes later is rounded by what it will read.
One weight and one matrix of inputs are in memory at a time; integers go to mapped files without names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfx.adapters.adapter import Adapter
from peftfx.export.rounding.gptq import factor_of, outputs_off, round_by_inputs
from peftfx.export.rounding.texts import whole_call
from peftfx.export.verification.eager_reference import EagerReference
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.model.adapted import AdaptedModel
from peftfx.quantisation.coded import mapped_copy
from peftfx.quantisation.rounding import Rounded, round_blocks
from peftfx.sites.sites import Sites


@dataclass(frozen=True)
class Candidate:
    """A weight to round by its inputs.

    Attributes:
        key: what it is known by.
        paths: of the modules that multiply by it.
        weight: makes it, [out, in]; the dtype is that of its scales.
        scheme: how it is rounded.
        signed: whether a scale may be negative.
        dtype: of its scales, where that is another one.
    """

    key: object
    paths: Sequence[str]
    weight: Callable[[], Tensor]
    scheme: Scheme
    signed: bool = True
    dtype: torch.dtype | None = None


@dataclass
class Fitted:
    """What GPTQ did.

    Attributes:
        text: on which.
        tokens: of it.
        weights: that were rounded so.
        off: what the outputs of a weight are off by, over their norm, in the mean of the weights.
        plain: the same where each number is the nearest integer's.
        left: why other weights were rounded without the text, by the paths of their modules.
    """

    text: str
    tokens: int
    weights: int = 0
    off: float = 0.0
    plain: float = 0.0
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        gain = f"outputs are {self.off:.2%} off, {self.plain:.2%} on the nearest integers"
        left = "".join(f"; without it {path}: {why}" for path, why in list(self.left.items())[:3])
        return f"{self.weights} weights on {self.tokens:,} tokens of {self.text}: {gain}{left}"

    def add(self, off: float, plain: float) -> None:
        """Add a weight to the means."""
        self.weights += 1
        self.off += (off - self.off) / self.weights
        self.plain += (plain - self.plain) / self.weights


class _Enough(Exception):
    """All weights are rounded: what the model would compute further is of no use."""


@dataclass
class Watched(EagerReference):
    """The model's own code with hooks that are put on its modules behind those of the adapters.

    Attributes:
        watch: puts hooks on; the stack takes them off.
    """

    watch: Callable[[ExitStack], object] = lambda _: None

    def _call(self, base: nn.Module, adapters: Sequence[Adapter], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with ExitStack() as stack:
            self.watch(stack)
            return super()._call(base, adapters, feed)


def paths_of(sites: Sites) -> Callable[[object], list[str]]:
    """The paths of the modules that multiply by a weight, by the graph's name for it."""
    found: dict[object, list[str]] = {}
    for site in sites.weights:
        for source in {site.weight, f"{DERIVED}.{site.path}.weight"}:
            found.setdefault(source, []).append(site.path)
    return lambda source: found.get(source, [])


def layer_at(base: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, if its forward is one product with its weight, or a lookup in it."""
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear | Conv1D | nn.Embedding) else None


@torch.no_grad()
def fit_weights(
    adapted: AdaptedModel, ids: Tensor, named: str, candidates: Sequence[Candidate], beside: Path, *, merged: bool
) -> tuple[dict[object, Rounded], Fitted]:
    """Round weights by what they are multiplied with on a text; by their keys, and what is told of it.

    Args:
        adapted: the model, whose active adapters act.
        ids: of the text, [rows, tokens].
        named: what the text is.
        candidates: what to round. One whose module does not run, or is no linear layer, is left out, and told.
        beside: a directory on whose disk the integers are kept.
        merged: whether the weights are those that the adapters were folded into, or the adapters stay beside them.

    Raises:
        PeftfxError: the model reads no text.
    """
    walk = _Walk(beside, Fitted(named, ids.numel()))
    call, can = whole_call(adapted, ids, named), list[tuple[Candidate, list[str]]]()
    for candidate in candidates:
        modules = {path: layer_at(adapted.base, path) for path in candidate.paths}
        odd = [path for path, module in modules.items() if module is None]
        products = [path for path, module in modules.items() if not isinstance(module, nn.Embedding)]
        if odd or not products:
            walk.told.left[odd[0] if odd else str(candidate.key)] = "no linear layer multiplies by it"
        else:
            can.append((candidate, products))
    walk.waiting = {candidate.key for candidate, _ in can}

    def watch(stack: ExitStack) -> None:
        for candidate, paths in can:
            for path in paths:
                walk.watch(candidate, adapted.base.get_submodule(path), stack)

    with ExitStack() as stack, suppress(_Enough):
        if not merged:
            watch(stack)  # ahead of what adapters add
        if can:
            Watched(adapted, None, adapted.example, watch=watch if merged else lambda _: None)(call)
    walk.told.left |= {paths[0]: "it does not run on a text" for c, paths in can if c.key in walk.waiting}
    return walk.made, walk.told


@dataclass
class _Walk:
    """The state of a call in which weights are rounded.

    Attributes:
        beside: a directory on whose disk integers are kept.
        told: what was done.
        made: by key.
        waiting: the keys of what is to be rounded.
    """

    beside: Path
    told: Fitted
    made: dict[object, Rounded] = field(default_factory=dict)
    waiting: set[object] = field(default_factory=set)
    _inputs: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None
    _off: tuple[object, Tensor] | None = None

    def watch(self, candidate: Candidate, module: nn.Module, stack: ExitStack) -> None:
        """Round a weight when its module runs, and give the outputs that it has then."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if candidate.key in self.waiting:
                self._round(candidate, (*args, *kwargs.values())[0])
                self.waiting.discard(candidate.key)
                if not self.waiting:
                    raise _Enough

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = (*args, *kwargs.values())[0]
            if self._off is None or self._off[0] != candidate.key:  # it runs again
                weight = candidate.weight().float()
                self._off = candidate.key, _values(self.made[candidate.key], candidate.scheme, weight) - weight
            off, self._off = self._off[1], None
            return y + (x.float() @ off.T).to(y.dtype)

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _round(self, candidate: Candidate, x: Tensor) -> None:
        scheme, given = candidate.scheme, candidate.weight()
        if self._inputs is None or self._inputs[0] is not x:  # several layers read one input
            flat = x.detach().flatten(0, -2).float()
            hessian = flat.T @ flat
            self._inputs = x, hessian, factor_of(hessian)
        _, hessian, factor = self._inputs
        options = {"symmetric": scheme.symmetric, "search": scheme.search, "signed": candidate.signed}
        grid = round_blocks(given, scheme.bits, scheme.block, **options)
        scales = grid.scales.to(candidate.dtype or given.dtype)
        grid, weight = Rounded(grid.integers, scales, grid.zeros), given.float()
        made = round_by_inputs(weight, grid, factor, scheme.bits)
        values = _values(made, scheme, weight)
        plain = outputs_off(weight, _values(grid, scheme, weight), hessian)
        self.told.add(outputs_off(weight, values, hessian), plain)
        self.made[candidate.key] = Rounded(mapped_copy(made.integers, self.beside), made.scales, made.zeros)
        self._off = candidate.key, values - weight


def _values(made: Rounded, scheme: Scheme, like: Tensor) -> Tensor:
    return made.values(scheme.middle)[:, : like.shape[1]]
