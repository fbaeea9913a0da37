"""Verify an export: ONNX Runtime computes what the reference computes, or a VerificationError says where not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.choices import Following, Nearness, ShownChoices, shown_choices
from peftfx.export.verification.float32_twin import runnable
from peftfx.export.verification.in_parts import InParts
from peftfx.export.verification.tolerance import Tensors, Tolerance
from peftfx.graph.graph import Graph
from peftfx.serving.onnx_model import OnnxModel, find
from peftfx.telling import tell_share

Reference = Callable[[Tensors], Tensors]
"""A function that a model is compared with. It takes inputs by name and returns outputs by name."""
Shown = Callable[[str, Tensors, Tensor], Tensor]
"""A function that selects what to compare of an output, given its name, the inputs, and its value."""
MAPPED = 256 << 20  #: bytes of a model from which its weights are mapped, and not copied by ONNX Runtime
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

    def __str__(self) -> str:
        if self.wrong:
            return f"{self.output}: {self.wrong}"
        told = f"{self.output}: {self.max_abs:.3g} absolute, {self.max_rel:.3g} relative, may be {self.bound:.3g}"
        return told if self.noise is None else f"{told}; torch itself is {self.noise:.2g} from float64"


def verify(
    directory: Path,
    reference: Reference,
    inputs: Sequence[Tensors],
    *,
    atol: float | None = 1e-4,
    rtol: float | None = 1e-4,
    graph: Graph | None = None,
    shown: Shown | None = None,
    put: Mapping[str, ort.OrtValue] | None = None,
    measured: Collection[int] | None = None,
    unrounded: Reference | None = None,
) -> list[Comparison]:
    """Run the model saved in `directory` and the `reference` on each set of inputs, and compare every output.

    A model in bfloat16 is run as its float32 twin over the same weights (`runnable`), because ONNX Runtime's CPU
    provider has no bfloat16 kernels. A large model is run in parts: see `peftfx.export.verification.in_parts`. Outputs
    that are not floating-point have to be equal. If the first two axes of an output are those of `attention_mask`, the
    output is not compared at tokens where the mask is 0: results for padding do not matter. A model in half precision
    that chooses experts is compared under its own choices (`peftfx.export.verification.choices`), and so is another
    one that would be refused.

    Args:
        directory: the directory that `save` wrote, or the model's `.onnx` file.
        reference: computes what the model has to give.
        inputs: the calls to compare. Sizes that the export never saw prove most.
        atol: the absolute tolerance.
        rtol: the tolerance relative to the largest magnitude of an output. If both are None, the tolerance is measured:
            see `peftfx.export.verification.tolerance`.
        graph: if given, the model also has to have the inputs and axes of this graph.
        shown: selects what to compare of an output, in place of the rule for `attention_mask` above.
        put: the tensors to put into the model's slots.
        measured: the numbers of the calls that are also run in float64 if the tolerance is measured; by default all.
        unrounded: computes in torch what the model computes, without the rounding of its weights. It is held to the
            reference by the measured tolerance.

    Raises:
        VerificationError: an output is missing, has a NaN, or differs by more than the tolerance.
    """
    own = range(len(inputs)) if measured is None else measured
    tolerance, tight, where = Tolerance(atol, rtol), Tolerance(None, None), str(find(directory))
    measures = tolerance if unrounded is None else tight
    with runnable(find(directory)) as (path, widened), shown_choices(path) as shows:
        large = _size(path.parent) > MAPPED
        model = OnnxModel(path, mapped=large)
        model.put(put or {})
        choose = shown or functools.partial(_unpadded, model.axes)
        if graph is not None:
            _same_interface(model, graph)
        calls = [_widened(feed, model) if widened else feed for feed in inputs]
        follows = None if shows is None or large or not tolerance.measures or unrounded is not None else shows
        chosen = functools.partial(_under_its_choices, follows, inputs, calls, own, reference, choose, put or {}, where)
        if follows is not None and (widened or follows.half) and (found := chosen()):
            return found
        found, plain = list[Comparison](), list[Comparison]()
        cut = InParts(model) if large else None
        answers = (model(**call) for call in calls) if cut is None else cut(calls)
        parts, start = (1, 0.5) if cut is None else (len(cut.parts), 0.75)
        for number, (feed, got) in enumerate(zip(inputs, answers, strict=True)):
            tell_share(f"{number} of {len(inputs)} calls", start + (1 - start) * number / len(inputs))
            want = reference(feed)
            exact = measures.measure(reference, feed) if measures.measures and number in own else {}
            told = functools.partial(_each, want, exact, feed, choose, where=where)
            found += told(got, tolerance, parts)
            if unrounded is not None:
                plain += told(unrounded(feed), tight, 1)
        _judged(plain, tight, where, "the graph with the adapter's tensors, in torch, disagrees with the reference")
        try:
            return _judged(found, tolerance, where)
        except VerificationError:
            with contextlib.suppress(VerificationError):
                if found := chosen():
                    return found
            raise


def _under_its_choices(
    shows: ShownChoices | None,
    inputs: Sequence[Tensors],
    calls: Sequence[Tensors],
    measured: Collection[int],
    reference: Reference,
    choose: Shown,
    put: Mapping[str, ort.OrtValue],
    where: str,
) -> list[Comparison]:
    """Compare a model with a reference that chooses what ONNX Runtime chose: `peftfx.export.verification.choices`.

    Return nothing if that cannot be done.

    Raises:
        VerificationError: they differ.
    """
    if shows is None:
        return []
    tolerance, near, found = Tolerance(None, None), Nearness(), list[Comparison]()
    model = OnnxModel(shows.path)
    model.put(put)
    for number, (feed, call) in enumerate(zip(inputs, calls, strict=True)):
        tell_share(f"{number} of {len(inputs)} calls", 0.5 + 0.5 * number / len(inputs))
        got = model(**call)
        following = Following(reference, shows.taken(got))
        want, own, exact = following(feed), following.scores, Tensors()
        if following.alike and number in measured:
            exact = tolerance.measure(following, feed)
            if exact and following.alike:
                near.learn(following.choices, own, following.scores)
        if not following.alike or tolerance.failure:
            return []
        if following.wrong:
            what = f"choice {following.wrong} of {len(following.choices)} is not of the largest scores"
            raise VerificationError(f"ONNX Runtime disagrees with the reference: {what}", where)
        found += _each(want, exact, feed, choose, got, tolerance, 1, where=where)
    if far := near.too_far:
        raise VerificationError(f"ONNX Runtime disagrees with the reference in the scores of a choice: {far}", where)
    return _judged(found, tolerance, where)


def _each(
    want: Tensors,
    exact: Tensors,
    feed: Tensors,
    choose: Shown,
    got: Mapping[str, Tensor],
    tolerance: Tolerance,
    parts: int,
    *,
    where: str,
) -> Iterator[Comparison]:
    """Compare each output of a call, and record the noise of each."""
    missing = sorted(set(want) - set(got))
    if missing:
        raise VerificationError(f"the model has no output {', '.join(missing)}", where, "export it again")
    shapes = {name: tuple(value.shape) for name, value in feed.items()}
    for name, value in want.items():
        select = functools.partial(choose, name, feed)
        one = _compare(name, value.detach(), got[name], select)
        noise = _largest_difference(exact[name], value, select) if name in exact else None
        tolerance.learn(name, noise, one.largest, value.dtype)
        yield dataclasses.replace(one, shapes=shapes, noise=noise, dtype=value.dtype, parts=parts)


def _judged(
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
        why = "" if tolerance.noise else tolerance.failure
        judged.append(dataclasses.replace(c, bound=bound, ok=not c.wrong and c.max_abs <= bound, unmeasured=why))
    wrong = sorted((c for c in judged if not c.ok), key=_badness, reverse=True)
    if wrong:
        names = len({c.output for c in wrong})
        what = f"{told} in {len(wrong)} of {len(judged)} comparisons"
        worst = list({c.output: c for c in reversed(wrong)}.values())[::-1][:WORST]
        lines = "".join(f"\n  {c}" for c in worst)
        more = f"\n  and {names - len(worst)} more outputs" if names > len(worst) else ""
        at = "\n  at " + ", ".join(f"{name} {shape}" for name, shape in short_shapes(wrong[0].shapes).items())
        raise VerificationError(f"{what}:{lines}{more}{at}", where, tolerance.told())
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


def _widened(feed: Tensors, model: OnnxModel) -> Tensors:
    """Convert the inputs of a float32 twin from bfloat16 to float32. Slots keep their dtype."""
    wide = {name: value.float() for name, value in feed.items() if value.dtype == torch.bfloat16}
    return feed | {name: value for name, value in wide.items() if name in model.inputs}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def reference_of(graph: Graph) -> Reference:
    """Return the reference that runs a graph, for the export of this graph."""

    def run(feed: Tensors) -> Tensors:
        with torch.no_grad():
            flat = graph.run(*(feed[spec.name] for spec in graph.inputs))
        named = zip(onnx_outputs(graph), flat, strict=True)
        return {name: value for name, value in named if isinstance(value, Tensor)}

    return run


def _same_interface(model: OnnxModel, graph: Graph) -> None:
    axes = model.axes
    fixed = [spec for spec in graph.inputs if spec.name not in model.slots]
    wrong = [f"{spec} is {list(axes.get(spec.name, ()))}" for spec in fixed if axes.get(spec.name) != spec.shape]
    if wrong:
        raise VerificationError(f"the model's inputs are not the graph's: {'; '.join(wrong)}", str(model.path))


def _unpadded(axes: Mapping[str, tuple[int | str, ...]], name: str, feed: Tensors, value: Tensor) -> Tensor:
    """Return an output at unmasked tokens, or the whole output if its first two axes are not those of the mask."""
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()) or axes[name][:2] != axes["attention_mask"]:
        return value
    return value[mask != 0]


def _compare(name: str, want: Tensor, got: Tensor, select: Callable[[Tensor], Tensor]) -> Comparison:
    if want.shape != got.shape:
        return Comparison(name, {}, _INF, _INF, False, wrong=f"shape {list(got.shape)}, not {list(want.shape)}")
    want, got = select(want.cpu().to(torch.float64)), select(got.to(torch.float64))
    for side, value in (("the model's own code", want), ("ONNX Runtime", got)):
        if bool(value.isnan().any()):
            return Comparison(name, {}, _INF, _INF, False, wrong=f"{side} gives NaN")
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
