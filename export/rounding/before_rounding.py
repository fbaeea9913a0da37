"""What an export rounds, compared before it is rounded: in half precision, or to codes, a lost update is in the noise.

Rounded weights change the outputs of a model as much as a lost update of one of its layers does, and no tolerance tells
the two apart. So the graphs are also compared in torch with their weights as they were folded:

1. the captured graph, with the adapters apart, gives what the model's own code gives;
2. the merged graph gives what the captured graph gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from peftfx.adapters.recipes import Derived
from peftfx.bases.dtypes import HALF_DTYPES
from peftfx.export.verification.comparison import Shown, VerificationError, compared, judged
from peftfx.export.verification.tolerances.float64 import float32, float64
from peftfx.export.verification.tolerances.masked import relative_difference
from peftfx.export.verification.tolerances.tolerance import Tensors, Tolerance
from peftfx.export.verification.without_rounding import CodeAndGraph, graph_of, run_in
from peftfx.graph.graph import DERIVED, Graph
from peftfx.graph.lazy_weights import exact
from peftfx.graph.recipe import Get

_Mode = Callable[[], AbstractContextManager[object]]
#: How far an output may be off, of its largest magnitude, as merged weights are folded in float32.
_FOLDED, _LARGE_FOLDED = 1e-5, 1e-3
_NEAR = 8  #: times what outputs change by if the last bit of folded weights does
_SAME = ((nullcontext, 1e-5), (float64, 1e-6))  #: the same of one program in two forms, by how both run


def hold_merged(apart: Graph, merged: Graph, call: Tensors, where: str, *, small: bool) -> bool:
    """Compare a merged graph with the graph whose adapters are apart. Say whether that could be done.

    Args:
        apart, merged: the graphs.
        call: the inputs.
        where: the model's file, for errors.
        small: whether the model runs in float64. A larger one runs in float32 first, which is held less tightly.

    Deep models may multiply what folding in float32 rounds, random ones above all. So where the bound is passed, the
    outputs may differ by a few times what they change by if the last bit of each folded number does.

    Raises:
        VerificationError: an output differs by more than folding the weights in float32 explains.
    """
    if not merged.derived:
        return True
    worst, name = 0.0, ""
    for mode, bound in ((float64, _FOLDED),) if small else ((float32, _LARGE_FOLDED), (float64, _FOLDED)):
        want, got = (run_in(mode, run, call) for run in (graph_of(apart), graph_of(merged, _unrounded(merged, mode))))
        if want is None or got is None:
            return False
        worst, name = _worst(want, got)
        if worst <= bound:
            return True
    moved = run_in(mode, graph_of(merged, _moved(_unrounded(merged, mode))), call)
    if got and moved and worst <= _NEAR * _worst(got, moved)[0] < math.inf:
        return True
    what = f"{name} of the merged model, before its weights are rounded, is {worst:.2g} of its largest magnitude off"
    raise VerificationError(what, where, "report this model")


def hold_graph(captured: CodeAndGraph, call: Tensors, shown: Shown, where: str) -> None:
    """Compare a captured graph with the model's own code, as an unrounded model is compared.

    Raises:
        VerificationError: they differ.
    """
    for mode, bound in _SAME:
        runs = [run_in(mode, run, call) for run in (captured.code, captured.graph)]
        want, got = ({n: shown(n, call, v) for n, v in (own or {}).items()} for own in runs)
        if want and got and _worst(want, got)[0] <= bound:
            return
    tolerance = Tolerance(None, None, floats_alone=True)
    exactly = tolerance.measure(captured.code, call)
    with torch.no_grad():
        want, got = captured.code(call), captured.graph(call)
    found = compared(want, exactly, call, shown, got, tolerance, 1, where=where)
    judged(list(found), tolerance, where, "before its weights are rounded, the graph disagrees with the model's code")


def _unrounded(graph: Graph, mode: _Mode) -> Get:
    """Return a function that reads a graph's tensors, and computes derived ones without rounding.

    Weights are folded in float32. What else depends on no input, such as a prompt, is computed in the mode.
    """

    def wide(target: str) -> Tensor:
        value = exact(read(target))
        return value.float() if value.dtype in HALF_DTYPES else value

    def read(target: str) -> Tensor:
        name = target.removeprefix(f"{DERIVED}.")
        if name == target or name in graph.evaluated:
            return graph.get(target)
        recipe = graph.derived[name]
        if isinstance(recipe, Derived):
            return recipe.evaluate(wide)
        with mode():
            return recipe.evaluate(read)

    return read


def _moved(get: Get) -> Get:
    """Return a function that reads derived weights with each number moved by its last bit in float32, up or down."""
    rng = torch.Generator().manual_seed(0)

    def read(target: str) -> Tensor:
        value = get(target)
        if not target.startswith(f"{DERIVED}.") or not value.is_floating_point():
            return value
        signs = 2 * torch.randint(0, 2, value.shape, generator=rng) - 1
        return value * (1 + signs.to(value.device) * torch.finfo(torch.float32).eps)

    return read


def _worst(want: Tensors, got: Tensors) -> tuple[float, str]:
    """Return how far the output is off that is furthest off, and its name. Whole numbers, such as classes, are not."""
    return max(((_off(v, got[n]), n) for n, v in want.items() if n in got and v.is_floating_point()), default=(0.0, ""))


def _off(want: Tensor, got: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest magnitude."""
    if want.shape != got.shape:
        return float("inf")
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    return relative_difference(want[finite], got[finite])
