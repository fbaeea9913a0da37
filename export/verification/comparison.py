"""verify: what ONNX Runtime computes is what the reference computes, or a VerificationError says where it is not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.float32_twin import runnable
from peftfx.export.verification.tolerance import Tensors, Tolerance
from peftfx.graph.graph import Graph
from peftfx.serving.onnx_model import OnnxModel, find
from peftfx.telling import tell_share

Reference = Callable[[Tensors], Tensors]
"""What a model is held against: takes inputs by name and returns outputs by name."""
Shown = Callable[[str, Tensors, Tensor], Tensor]
"""What to compare of an output: given its name, the inputs, and its value."""
MAPPED = 256 << 20  #: bytes of a model from which ONNX Runtime is not let copy its weights
WORST = 3  #: how many outputs a message names


class VerificationError(PeftfxError):
    """The saved model and its reference disagree."""

    exit_code = 1


@dataclass(frozen=True)
class Comparison:
    """One output at one set of inputs: how far ONNX Runtime is from the reference.

    Attributes:
        output: the output's name.
        shapes: the shapes of the inputs.
        max_abs: the largest absolute difference; infinite where shapes differ, or where a value is NaN.
        max_rel: `max_abs` over the largest magnitude in the reference.
        ok: whether `max_abs <= bound`.
        bound: what it may be.
        noise: the largest difference between the reference in its own dtype and in float64; None where not measured.
        wrong: what is wrong with the output, where that is no difference of numbers.
        largest: the largest magnitude in the reference.
        dtype: of the reference.
        unmeasured: why float64 could not be had, where it could not: the bound is a constant then.
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
) -> list[Comparison]:
    """Run the model saved in `directory` and `reference` on each set of inputs and compare every output.

    A model in bfloat16 is run as its float32 twin over the same weights (`runnable`): ONNX Runtime's CPU provider has
    no kernels for it. Outputs that are not floating have to be equal. Where `attention_mask` is 0, outputs whose first
    two axes are the mask's are not compared: what a model computes for padding is nobody's business.

    Args:
        directory: where `save` wrote the model, or its `.onnx` file.
        reference: what it is held against.
        inputs: the calls to compare; sizes that the export never saw tell the most.
        atol: the absolute tolerance.
        rtol: the tolerance relative to the largest magnitude of an output. Where both are None, what may differ is
            measured: see `peftfx.export.verification.tolerance`.
        graph: where given, the model also has to have the inputs and axes of this graph.
        shown: what to compare of an output, where that is not as above.
        put: what to put into the model's slots.
        measured: the numbers of the calls that the reference answers in float64 too, where that is measured; all.

    Raises:
        VerificationError: an output is missing, has a NaN, or differs by more than it may.
    """
    own = range(len(inputs)) if measured is None else measured
    tolerance = Tolerance(atol, rtol)
    with runnable(find(directory)) as (path, widened):
        model = OnnxModel(path, mapped=_size(path.parent) > MAPPED)
        model.put(put or {})
        choose = shown or functools.partial(_unpadded, model.axes)
        if graph is not None:
            _same_interface(model, graph)
        found = []
        for number, feed in enumerate(inputs):
            tell_share(f"{number} of {len(inputs)} calls", 0.5 + number / (2 * len(inputs)))
            want = reference(feed)
            exact = tolerance.measure(reference, feed) if tolerance.measures and number in own else {}
            got = model(**(_widened(feed, model) if widened else feed))
            missing = sorted(set(want) - set(got))
            if missing:
                what = f"the model has no output {', '.join(missing)}"
                raise VerificationError(what, str(model.path), "export it again")
            shapes = {name: tuple(value.shape) for name, value in feed.items()}
            for name, value in want.items():
                select = functools.partial(choose, name, feed)
                one = _compare(name, value.detach(), got[name], select)
                noise = _largest_difference(exact[name], value, select) if name in exact else None
                tolerance.learn(name, noise, one.largest, value.dtype)
                found.append(dataclasses.replace(one, shapes=shapes, noise=noise, dtype=value.dtype))
    return _judged(found, tolerance, str(find(directory)))


def _judged(found: Sequence[Comparison], tolerance: Tolerance, where: str) -> list[Comparison]:
    """These comparisons with what each may differ by.

    Raises:
        VerificationError: one differs by more; the message has the shapes once, and the worst outputs.
    """
    judged = []
    for c in found:
        bound = tolerance.bound(c.output, c.largest, c.dtype)
        why = "" if tolerance.noise else tolerance.failure
        judged.append(dataclasses.replace(c, bound=bound, ok=not c.wrong and c.max_abs <= bound, unmeasured=why))
    wrong = sorted((c for c in judged if not c.ok), key=_badness, reverse=True)
    if wrong:
        names = len({c.output for c in wrong})
        what = f"ONNX Runtime disagrees with the reference in {len(wrong)} of {len(judged)} comparisons"
        worst = list({c.output: c for c in reversed(wrong)}.values())[::-1][:WORST]
        lines = "".join(f"\n  {c}" for c in worst)
        more = f"\n  and {names - len(worst)} more outputs" if names > len(worst) else ""
        at = "\n  at " + ", ".join(f"{name} {shape}" for name, shape in short_shapes(wrong[0].shapes).items())
        raise VerificationError(f"{what}:{lines}{more}{at}", where, tolerance.told())
    return judged


def _badness(c: Comparison) -> tuple[bool, float]:
    return bool(c.wrong), c.max_abs / c.bound if c.bound else c.max_abs


def short_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Shapes of inputs by name; layers of a cache that are alike are told once, with a `*` for their number."""
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
    """What a float32 twin is given: its slots are as they were."""
    wide = {name: value.float() for name, value in feed.items() if value.dtype == torch.bfloat16}
    return feed | {name: value for name, value in wide.items() if name in model.inputs}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def reference_of(graph: Graph) -> Reference:
    """The reference that a graph is for its own export."""

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
    """What an output has where the mask shows something; all of it where the output does not run along the mask."""
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
    """Between finite numbers."""
    if exact.shape != value.shape or not value.is_floating_point():
        return 0.0
    error = select((exact.to(torch.float64) - value.detach().to(torch.float64)).cpu()).abs()
    finite = error[error.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


_INF = float("inf")
