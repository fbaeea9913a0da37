"""A model in half precision, held to its reference without the rounding of its own numbers.

In half precision torch itself is a percent or so from exact arithmetic, and a measured tolerance is a multiple of that:
an adapter with a small effect could be lost within it. So such a model is also compared where nothing is rounded to
half precision: torch runs in float64, and ONNX Runtime runs a twin that computes the same graph in float32. These agree
to about 1e-6 of the largest output. Outputs of whole numbers, such as classes, that differ in half precision are judged
here: two correct programs may decide near-ties otherwise.

The comparison has two steps, because merged weights are rounded:

1. the captured graph, in float64, is the model's own code with its adapters, in float64;
2. the twin is the graph that was written, with the weights that were written, in float64.

The tensors in slots are rounded, too: in step 1 they are not yet, in step 2 they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.dtypes import is_half
from peftfx.errors import raise_if_memory_is_out, warn
from peftfx.export.verification.choices import Following, shown_choices
from peftfx.export.verification.comparison import (
    Comparison,
    Reference,
    Shown,
    VerificationError,
    compared,
    judged,
    reference_of,
)
from peftfx.export.verification.float32_twin import unrounded
from peftfx.export.verification.tolerances.float64 import MOST_EXACT, float32, float64
from peftfx.export.verification.tolerances.masked import relative_difference
from peftfx.export.verification.tolerances.tolerance import MULTIPLE, Tensors, Tolerance
from peftfx.export.verification.verify import is_mapped, unpadded
from peftfx.graph.graph import Graph
from peftfx.graph.recipe import Get
from peftfx.serving.onnx_model import OnnxModel

_NEAR = 1e-6  #: of the largest magnitude: two programs in float64
_ALIKE = 0.9  #: the least share of equal numbers of two programs that round at the same places
_LOST = 1 / 32  #: of the noise: what numbers in the code may lose, which ONNX holds in half precision
_TOLD = "without rounding to half precision, ONNX Runtime disagrees with the graph"
_WIDER = 2  #: how many times as large the weights are in float32, as ONNX Runtime holds those that are not mapped


def runs_without_rounding(base: nn.Module) -> bool:
    """Say whether a model is in half precision, and small enough to run in float64."""
    return is_half(base) and runs_exactly(base)


def runs_exactly(base: nn.Module) -> bool:
    """Say whether a model is small enough to run in float64."""
    return sum(p.numel() for p in base.parameters()) <= MOST_EXACT


def graph_of(graph: Graph, read: Get | None = None) -> Reference:
    """Return the reference that runs a graph. Each derived weight is computed where it is read, and then released.

    Args:
        graph: the graph.
        read: reads its weights, by the targets of the nodes that read them; by default the graph's own.
    """
    return reference_of(graph, _Deriving(graph, read or graph.get).run if graph.derived or read else None)


class _Deriving(fx.Interpreter):
    """A run of a graph that computes derived weights as an export writes them, in whichever mode the graph runs."""

    def __init__(self, graph: Graph, read: Get) -> None:
        self._get, module = read, graph.clone().module
        place = {node: index for index, node in enumerate(module.graph.nodes)}
        for node in place:
            if node.op == "get_attr" and node.users:
                min(node.users, key=place.__getitem__).prepend(node)  # as late as possible: a weight waits in memory
        super().__init__(module)

    def get_attr(self, target: fx.node.Target, args: object, kwargs: object) -> Tensor:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return self._get(str(target))


@dataclass(frozen=True)
class CodeAndGraph:
    """Two programs that have to be one, with the same adapters.

    Attributes:
        code: the model's own code.
        graph: its graph as captured.
        rounded: the two with tensors in slots that are rounded to the model's dtype; None if there are none.
    """

    code: Reference
    graph: Reference
    rounded: CodeAndGraph | None = None


def hold_without_rounding(
    path: Path,
    captured: CodeAndGraph,
    written: Reference,
    call: Tensors,
    compared_as_is: Sequence[Comparison],
    shown: Shown | None,
    *,
    sigmoids: frozenset[str] = frozenset(),
    put: Mapping[str, ort.OrtValue] | None = None,
) -> bool:
    """Compare a saved model with its graphs and its reference where nothing is rounded to half precision, in one call.

    Return False for a model in float32, or if the graphs or the model's own code cannot run in float64: then not all is
    compared.

    Args:
        path: the model's file.
        captured: the model's own code, and its graph as captured.
        written: the graph that was written, merged or not, whose numbers are rounded (`with_rounded_numbers`).
        call: the inputs.
        compared_as_is: the comparisons of the model with its rounding.
        shown: selects what to compare of an output; by default that of unmasked tokens.
        sigmoids: the names of the outputs that a sigmoid makes.
        put: the tensors to put into the model's slots.

    Raises:
        VerificationError: ONNX Runtime differs from the graph that was written.
    """
    run, at = written, str(path)
    with unrounded(path) as twin:
        if twin is None:
            return False
        want, near = (run_in(functools.partial(mode, rounded=True), run, call) for mode in (float64, float32))
        if want is None or near is None:
            return False
        tolerance = Tolerance(None, None, sigmoids=sigmoids)
        model = OnnxModel(twin, mapped=is_mapped(path, _WIDER))
        model.put(put or {})
        choose = shown or functools.partial(unpadded, model.axes)
        for c in compared_as_is:
            tolerance.learn(c.output, None if c.noise is None else _LOST / MULTIPLE * c.noise, c.largest, torch.float32)
        wide = {name: value if name in model.slots else _widened(value) for name, value in call.items()}

        def hold(want: Tensors, near: Tensors, got: Tensors) -> None:
            found = compared(near, want, call, choose, got, tolerance, 1, where=at)
            judged(list(found), tolerance, at, _TOLD)

        try:
            hold(want, near, model(**wide))
        except VerificationError:
            if not _under_its_choices(twin, run, call, wide, put or {}, hold):
                raise
    return _hold_captured(captured, call, choose, path)


def _under_its_choices(
    twin: Path,
    run: Reference,
    call: Tensors,
    wide: Tensors,
    put: Mapping[str, ort.OrtValue],
    hold: Callable[[Tensors, Tensors, Tensors], None],
) -> bool:
    """Compare a twin with its graph that goes on with the twin's choices. Return False if it makes none."""
    with shown_choices(twin) as shows:
        if shows is None:
            return False
        model = OnnxModel(shows.path, mapped=is_mapped(twin, _WIDER))
        model.put(put)
        got = model(**wide)
        following = Following(run, shows.taken(got))
        want, near = (run_in(functools.partial(mode, rounded=True), following, call) for mode in (float64, float32))
        if want is None or near is None or not following.alike or following.wrong:
            return False
        hold(want, near, got)
    return True


def _hold_captured(captured: CodeAndGraph, call: Tensors, shown: Shown, path: Path) -> bool:
    """Warn if the captured graph is not the model's own code, neither in float64 nor in its own dtype, as rounded.

    Return False if they cannot be compared so.
    """
    for mode, same, pair in ((float64, _near, captured), (nullcontext, _alike, captured.rounded or captured)):
        want, got = run_in(mode, pair.code, call), run_in(mode, pair.graph, call)
        if want is None or got is None:
            return False
        shared = {name: (value, got[name]) for name, value in _numbers(want).items() if name in got}
        far = [name for name, both in shared.items() if not same(*(shown(name, call, value) for value in both))]
        if not far:
            return True
    what = (
        f"the model's own code and its graph differ in {far[0]} by more than rounding does, but less than the tolerance"
    )
    warn(f"{path.name}: {what}")
    return True


def run_in(mode: Callable[[], AbstractContextManager[object]], run: Reference, call: Tensors) -> Tensors | None:
    """Run a reference in a mode. Return None if it cannot run there, such as an operator without float64."""
    try:
        with torch.no_grad(), mode():
            return run(call)
    except Exception as error:  # a model's code raises various errors
        raise_if_memory_is_out(error)
        return None


def _near(want: Tensor, got: Tensor) -> bool:
    finite = want.isfinite() & got.isfinite()
    return relative_difference(want[finite], got[finite]) <= _NEAR


def _alike(want: Tensor, got: Tensor) -> bool:
    return want.shape == got.shape and float((want == got).double().mean()) >= _ALIKE


def _numbers(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if value.is_floating_point()}


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
