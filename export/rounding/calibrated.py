"""Round the weights of a model by GPTQ, in one call of the model on a text.

The model's own code runs once, on the whole text. When a layer is about to run, its inputs are known and its weight is
rounded. The layer then returns the outputs of the rounded weight, so later layers are rounded with the inputs that they
will really read. Only one weight and one matrix of inputs are in memory at a time. The integers go to mapped files
without names.
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
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.graph.places import module_at
from peftfx.model.adapted import AdaptedModel
from peftfx.quantisation.coded import mapped_copy
from peftfx.quantisation.rounding import Rounded, round_blocks
from peftfx.sites.sites import Sites


@dataclass(frozen=True)
class Candidate:
    """A weight that GPTQ may round.

    Attributes:
        key: identifies the weight.
        paths: the paths of the modules that multiply by the weight.
        weight: computes the weight, [out, in]. Its dtype is also the dtype of its scales.
        scheme: how the weight is rounded.
        signed: whether a scale may be negative.
        dtype: the dtype of the scales, if it differs from the weight's.
    """

    key: object
    paths: Sequence[str]
    weight: Callable[[], Tensor]
    scheme: Scheme
    signed: bool = True
    dtype: torch.dtype | None = None


@dataclass
class Fitted:
    """The results of GPTQ, and how much it helped.

    Attributes:
        text: the name of the text.
        tokens: the number of tokens of the text.
        weights: the number of weights that GPTQ rounded.
        off: the error of a weight's outputs relative to their norm, averaged over the weights.
        plain: the same if each number is rounded to the nearest integer.
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
    """Raised when all weights are rounded, to end the call: the rest of the computation is not needed."""


@dataclass
class Watched(EagerReference):
    """The model's own code, with hooks on its modules that run after the hooks of the adapters.

    Attributes:
        watch: registers the hooks; the given stack removes them.
    """

    watch: Callable[[ExitStack], object] = lambda _: None

    def _call(self, base: nn.Module, adapters: Sequence[Adapter], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with ExitStack() as stack:
            self.watch(stack)
            return super()._call(base, adapters, feed)


def paths_of(sites: Sites) -> Callable[[object], list[str]]:
    """Return a function from a weight's source in the graph to the paths of the modules that multiply by it."""
    found: dict[object, list[str]] = {}
    for site in sites.weights:
        for source in {site.weight, f"{DERIVED}.{site.path}.weight"}:
            found.setdefault(source, []).append(site.path)
    return lambda source: found.get(source, [])


def layer_at(base: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, if its forward is one product with its weight, or a lookup in it; else None."""
    module = module_at(base, path)
    return module if isinstance(module, nn.Linear | Conv1D | nn.Embedding) else None


@torch.no_grad()
def fit_weights(
    adapted: AdaptedModel, ids: Tensor, named: str, candidates: Sequence[Candidate], beside: Path, *, merged: bool
) -> tuple[dict[object, Rounded], Fitted]:
    """Round weights by the inputs that they get on a text. Return the rounded weights by key, and a summary.

    Args:
        adapted: the model, whose active adapters act.
        ids: the token ids of the text, [rows, tokens].
        named: the name of the text.
        candidates: the weights to round. A weight whose module does not run, or is no linear layer, is left out and
            listed in the summary.
        beside: a directory on the disk where the integers are kept.
        merged: whether the adapters were folded into the weights. Otherwise they stay unmerged.

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
            watch(stack)  # before the hooks of the adapters
        if can:
            Watched(adapted, None, adapted.example, watch=watch if merged else lambda _: None)(call)
    walk.told.left |= {paths[0]: "it does not run on a text" for c, paths in can if c.key in walk.waiting}
    return walk.made, walk.told


@dataclass
class _Walk:
    """The state of a call in which weights are rounded.

    Attributes:
        beside: a directory on the disk where the integers are kept.
        told: the summary.
        made: the rounded weights, by key.
        waiting: the keys of the weights that are still to be rounded.
    """

    beside: Path
    told: Fitted
    made: dict[object, Rounded] = field(default_factory=dict)
    waiting: set[object] = field(default_factory=set)
    _inputs: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None
    _off: tuple[object, Tensor] | None = None

    def watch(self, candidate: Candidate, module: nn.Module, stack: ExitStack) -> None:
        """Round a weight when its module is about to run, and make the module return the rounded weight's outputs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if candidate.key in self.waiting:
                self._round(candidate, (*args, *kwargs.values())[0])
                self.waiting.discard(candidate.key)
                if not self.waiting:
                    raise _Enough

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = (*args, *kwargs.values())[0]
            if self._off is None or self._off[0] != candidate.key:  # the module runs again
                weight = candidate.weight().float()
                self._off = candidate.key, _values(self.made[candidate.key], candidate.scheme, weight) - weight
            off, self._off = self._off[1], None
            return y + (x.float() @ off.T).to(y.dtype)

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _round(self, candidate: Candidate, x: Tensor) -> None:
        scheme, given = candidate.scheme, candidate.weight()
        if self._inputs is None or self._inputs[0] is not x:  # several layers may read one input
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
