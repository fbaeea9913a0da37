"""Comparisons of outputs: how far ONNX Runtime's are from the reference's, and how far they may be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from peftfx.errors import PeftfxError, listed, warn
from peftfx.export.translation.program import onnx_outputs, values_of_outputs
from peftfx.export.verification.eager.kept_state import run_kept
from peftfx.export.verification.tolerances.masked import magnitude_of_masks
from peftfx.export.verification.tolerances.tolerance import Tensors, Tolerance
from peftfx.graph.graph import Graph

Reference = Callable[[Tensors], Tensors]
"""A function that a model is compared with. It takes inputs by name and returns outputs by name."""
Shown = Callable[[str, Tensors, Tensor], Tensor]
"""A function that selects what to compare of an output, given its name, the inputs, and its value."""
_Select = Callable[[Tensor], Tensor]
_LOOSE = 0.5  #: of an output's largest magnitude: a tolerance beyond it lets nearly any answer pass
WORST = 3  #: how many outputs a message names


class VerificationError(PeftfxError):
    """Raised when the saved model and its reference disagree."""

    exit_code = 1


@dataclass(frozen=True)
class Comparison:
    """The difference between ONNX Runtime and the reference, for one output in one call.

    Attributes:
        output: the output's name.
        shapes: the shapes of the inputs.
        max_abs: the largest absolute difference; infinite if shapes differ, or if a value is NaN.
        max_rel: `max_abs` relative to the largest magnitude in the reference.
        ok: whether `max_abs <= bound`.
        bound: the tolerance of `max_abs`.
        noise: the largest difference between the reference in its own dtype and in float64; None if not measured.
        wrong: what is wrong with the output, if not a difference of numbers; otherwise empty.
        largest: the largest magnitude in the reference.
        dtype: the dtype of the reference.
        unmeasured: why the reference could not be run in float64; then the tolerance is a constant. Empty if it could.
        parts: in how many parts ONNX Runtime ran the model; see `peftfx.export.verification.in_parts`.
    """

    output: str
    shapes: Mapping[str, tuple[int, ...]]
    max_abs: float
    max_rel: float
    ok: bool
    bound: float = 0.0
    noise: float | None = None
    wrong: str = ""
    largest: float = 0.0
    dtype: torch.dtype = torch.float32
    unmeasured: str = ""
    parts: int = 1

    @property
    def says_little(self) -> bool:
        """Whether the tolerance is measured, and so large that nearly any answer would pass."""
        return self.noise is not None and self.bound > _LOOSE * self.largest > 0

    def __str__(self) -> str:
        if self.wrong:
            return f"{self.output}: {self.wrong}"
        told = f"{self.output}: {self.max_abs:.3g} absolute, {self.max_rel:.3g} relative, may be {self.bound:.3g}"
        return told if self.noise is None else f"{told}; torch itself is {self.noise:.2g} from float64"


def but_near_ties(
    compare: Callable[..., list[Comparison]],
    graph: Graph,
    *,
    rounds: bool = False,
    without_rounding: Callable[[Sequence[Comparison]], bool] | None = None,
) -> list[Comparison]:
    """Compare all outputs; where rounding may decide near-ties, judge those that are not in floating point apart.

    Args:
        compare: compares outputs, takes `floats_alone`, and tells `on_loose` how it compares them.
        graph: the graph whose outputs they are.
        rounds: whether weights were rounded. Then the shapes of such outputs are compared alone, if they differ.
        without_rounding: compares the model where nothing is rounded, given the comparisons with its rounding, and says
            whether it could. It then decides about such outputs, and what `compare` tells is no longer of interest.

    Raises:
        VerificationError: outputs differ.
    """
    loose, differs = list[str](), None
    try:
        found = compare(on_loose=loose.append)
    except VerificationError as error:
        if not rounds and without_rounding is None:
            raise
        loose.clear()
        found, differs = compare(on_loose=loose.append, floats_alone=True), error
    exact = without_rounding is not None and without_rounding(found)
    if differs and not (rounds or exact):
        raise differs
    if differs and rounds:
        loose.append(_only_shapes(found, graph))
    for told in () if exact else loose:
        warn(told)
    return found


def _only_shapes(found: Iterable[Comparison], graph: Graph) -> str:
    """Return what a user is told about the outputs of a graph that are not among what was found."""
    seen = {one.output for one in found}
    apart = [name for name in values_of_outputs(graph) if name not in seen]
    return f"{listed(apart)}: only shapes are compared, as rounded weights may decide near-ties otherwise"


def compared(
    want: Tensors,
    exact: Tensors,
    feed: Tensors,
    choose: Shown,
    got: Mapping[str, Tensor],
    tolerance: Tolerance,
    parts: int,
    *,
    where: str,
    kinds: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Iterator[Comparison]:
    """Compare each output of a call, and record the noise of each. Of what may differ, the shape is compared.

    The dtypes of outputs are compared by `kinds`: those that the model's file declares.
    """
    missing = sorted(set(want) - set(got))
    if missing:
        raise VerificationError(f"the model has no output {', '.join(missing)}", where, "export it again")
    shapes = {name: tuple(value.shape) for name, value in feed.items()}
    for name, value in want.items():
        alike = value.shape == got[name].shape and value.dtype == got[name].dtype
        if tolerance.floats_alone and not value.is_floating_point() and alike:
            continue
        for told, select in _selections(name, value.detach(), functools.partial(choose, name, feed)):
            one = _compare(told, value.detach(), got[name], select, kinds.get(name))
            noise = _largest_difference(exact[name], value, select) if name in exact else None
            tolerance.learn(told, noise, one.largest, value.dtype)
            yield dataclasses.replace(one, shapes=shapes, noise=noise, dtype=value.dtype, parts=parts)


def _selections(name: str, want: Tensor, select: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, _Select]]:
    """Yield what is compared of an output, with its name: all that is shown, and the numbers that are no masks."""
    yield name, select
    if not want.is_floating_point():
        return
    shown = select(want.cpu().to(torch.float64))
    least = magnitude_of_masks(shown)
    if least < _INF:
        usual = shown.abs() < least
        yield f"{name}, but for masks", lambda value: select(value)[usual]


def judged(
    found: Sequence[Comparison],
    tolerance: Tolerance,
    where: str,
    told: str = "ONNX Runtime disagrees with the reference",
) -> list[Comparison]:
    """Return the comparisons with their tolerances, and refuse those that differ by more.

    Raises:
        VerificationError: an output differs by more. The message has the shapes once, and the worst outputs.
    """
    judged = []
    for c in found:
        bound = tolerance.bound(c.output, c.largest, c.dtype)
        why = "" if tolerance.measured else tolerance.failure
        judged.append(dataclasses.replace(c, bound=bound, ok=not c.wrong and c.max_abs <= bound, unmeasured=why))
    wrong = sorted((c for c in judged if not c.ok), key=_badness, reverse=True)
    if wrong:
        names = len({c.output for c in wrong})
        what = f"{told} in {len(wrong)} of {len(judged)} comparisons"
        worst = list({c.output: c for c in reversed(wrong)}.values())[::-1][:WORST]
        lines = "".join(f"\n  {c}" for c in worst)
        more = f"\n  and {names - len(worst)} more outputs" if names > len(worst) else ""
        at = "\n  at " + ", ".join(f"{name} {shape}" for name, shape in short_shapes(wrong[0].shapes).items())
        whole = not any(c.dtype.is_floating_point or c.wrong for c in wrong)
        raise VerificationError(f"{what}:{lines}{more}{at}", where, _WHOLE if whole else tolerance.told())
    return judged


def _badness(c: Comparison) -> tuple[bool, float]:
    return bool(c.wrong), c.max_abs / c.bound if c.bound else c.max_abs


def short_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the shapes of inputs by name. Equal shapes of a cache's layers are given once, with `*` as the number."""
    starred: dict[str, list[tuple[str, list[int]]]] = {}
    for name, shape in shapes.items():
        star = ".".join("*" if part.isdigit() else part for part in name.split("."))
        starred.setdefault(star, []).append((name, list(shape)))
    found: dict[str, list[int]] = {}
    for star, own in starred.items():
        alike = len(own) > 1 and all(shape == own[0][1] for _, shape in own)
        found |= {star: own[0][1]} if alike else dict(own)
    return found


def reference_of(graph: Graph, run: Callable[..., Iterable[object]] | None = None) -> Reference:
    """Return the reference that runs a graph, for the export of this graph.

    Args:
        graph: the graph.
        run: runs it on its flat inputs, in place of `graph.run`.
    """

    def answer(feed: Tensors) -> Tensors:
        with torch.no_grad():
            flat = run_kept(run or graph.run, graph, feed)
        named = zip(onnx_outputs(graph), flat, strict=True)
        return {name: value for name, value in named if isinstance(value, Tensor)}

    return answer


def _compare(
    name: str, want: Tensor, got: Tensor, select: Callable[[Tensor], Tensor], declared: torch.dtype | None
) -> Comparison:
    if want.shape != got.shape:
        return Comparison(name, {}, _INF, _INF, False, wrong=f"shape {list(got.shape)}, not {list(want.shape)}")
    kind = declared or got.dtype
    if want.dtype != kind and (declared or not (want.is_floating_point() and got.is_floating_point())):
        kinds = (str(dtype).removeprefix("torch.") for dtype in (kind, want.dtype))
        return Comparison(name, {}, _INF, _INF, False, wrong=", not ".join(kinds))
    small = _SMALL if want.dtype == torch.float16 else ""
    want, got = select(want.cpu().to(torch.float64)), select(got.to(torch.float64))
    for side, value in (("the model's own code", want), ("ONNX Runtime", got)):
        if bool(value.isnan().any()):
            return Comparison(name, {}, _INF, _INF, False, wrong=f"{side} gives NaN{small}")
    finite = want.isfinite()
    if not torch.equal(want[~finite], got[~finite]) or not bool(got[finite].isfinite().all()):
        return Comparison(name, {}, _INF, _INF, False, wrong="an infinity on one side alone")
    error, largest = (want - got)[finite].abs(), want[finite].abs()
    max_abs, scale = (float(t.max()) if t.numel() else 0.0 for t in (error, largest))
    return Comparison(name, {}, max_abs, max_abs / scale if scale else max_abs, True, largest=scale)


def _largest_difference(exact: Tensor, value: Tensor, select: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference between the finite numbers of two tensors."""
    if exact.shape != value.shape or not value.is_floating_point():
        return 0.0
    error = select((exact.to(torch.float64) - value.detach().to(torch.float64)).cpu()).abs()
    finite = error[error.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


_INF = float("inf")
_WHOLE = "whole numbers have to be equal, and rounding may decide near-ties: return the scores that decide them instead"
_SMALL = "; float16 has no numbers above 65504: export it in float32 or bfloat16"
