"""verify: what ONNX Runtime computes is what the reference computes, or a VerificationError says where it is not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch

from peftfx.errors import PeftfxError
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.float32_twin import runnable
from peftfx.graph.graph import Graph
from peftfx.serving.onnx_model import OnnxModel, find

Tensors = dict[str, torch.Tensor]
Reference = Callable[[Tensors], Tensors]
"""What a model is held against: takes inputs by name and returns outputs by name."""
Shown = Callable[[str, Tensors, torch.Tensor], torch.Tensor]
"""What to compare of an output: given its name, the inputs, and its value."""
MAPPED = 256 << 20  #: bytes of a model from which ONNX Runtime is not let copy its weights


class VerificationError(PeftfxError):
    """The saved model and its reference disagree."""


@dataclass(frozen=True)
class Comparison:
    """One output at one set of inputs: how far ONNX Runtime is from the reference.

    Attributes:
        output: the output's name.
        shapes: the shapes of the inputs.
        max_abs: the largest absolute difference; infinite where shapes differ or only one side is NaN.
        max_rel: `max_abs` over the largest magnitude in the reference.
        ok: whether `max_abs <= atol + rtol * largest magnitude`.
    """

    output: str
    shapes: Mapping[str, tuple[int, ...]]
    max_abs: float
    max_rel: float
    ok: bool

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        return f"{self.output}: {self.max_abs:.3g} absolute, {self.max_rel:.3g} relative, at {shapes}"


def verify(
    directory: Path,
    reference: Reference,
    inputs: Sequence[Tensors],
    *,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    graph: Graph | None = None,
    shown: Shown | None = None,
    put: Mapping[str, ort.OrtValue] | None = None,
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
        rtol: the tolerance relative to the largest magnitude of an output.
        graph: where given, the model also has to have the inputs and axes of this graph.
        shown: what to compare of an output, where that is not as above.
        put: what to put into the model's slots.

    Raises:
        VerificationError: an output is missing, or differs by more than `atol + rtol * its largest magnitude`.
    """
    with runnable(find(directory)) as (path, widened):
        model = OnnxModel(path, mapped=_size(path.parent) > MAPPED)
        model.put(put or {})
        choose = shown or functools.partial(_unpadded, model.axes)
        return _compare_all(model, reference, inputs, atol, rtol, graph, widened, choose)


def _compare_all(
    model: OnnxModel,
    reference: Reference,
    inputs: Sequence[Tensors],
    atol: float,
    rtol: float,
    graph: Graph | None,
    widened: bool,
    shown: Shown,
) -> list[Comparison]:
    if graph is not None:
        _same_interface(model, graph)
    comparisons = []
    for feed in inputs:
        want = reference(feed)
        got = model(**(_widened(feed, model) if widened else feed))
        missing = sorted(set(want) - set(got))
        if missing:
            raise VerificationError(f"the model has no output {', '.join(missing)}", str(model.path), "export it again")
        shapes = {name: tuple(value.shape) for name, value in feed.items()}
        for name, value in want.items():
            select = functools.partial(shown, name, feed)
            comparison = _compare(name, value.detach(), got[name], select, atol, rtol)
            comparisons.append(dataclasses.replace(comparison, shapes=shapes))
    wrong = [c for c in comparisons if not c.ok]
    if wrong:
        what = f"ONNX Runtime disagrees with the reference in {len(wrong)} of {len(comparisons)} comparisons"
        lines = "".join(f"\n  {c}" for c in wrong[:8])
        hint = f"the tolerance is {atol:g} + {rtol:g} * the largest magnitude"
        raise VerificationError(f"{what}:{lines}", str(model.path), hint)
    return comparisons


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
        return {name: value for name, value in named if isinstance(value, torch.Tensor)}

    return run


def _same_interface(model: OnnxModel, graph: Graph) -> None:
    axes = model.axes
    fixed = [spec for spec in graph.inputs if spec.name not in model.slots]
    wrong = [f"{spec} is {list(axes.get(spec.name, ()))}" for spec in fixed if axes.get(spec.name) != spec.shape]
    if wrong:
        raise VerificationError(f"the model's inputs are not the graph's: {'; '.join(wrong)}", str(model.path))


def _unpadded(axes: Mapping[str, tuple[int | str, ...]], name: str, feed: Tensors, value: torch.Tensor) -> torch.Tensor:
    """What an output has where the mask shows something; all of it where the output does not run along the mask."""
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()) or axes[name][:2] != axes["attention_mask"]:
        return value
    return value[mask != 0]


def _compare(
    name: str,
    want: torch.Tensor,
    got: torch.Tensor,
    select: Callable[[torch.Tensor], torch.Tensor],
    atol: float,
    rtol: float,
) -> Comparison:
    if want.shape != got.shape:
        return Comparison(f"{name} (shape {list(got.shape)}, not {list(want.shape)})", {}, _INF, _INF, False)
    exact = not want.dtype.is_floating_point
    want, got = select(want.cpu().to(torch.float64)), select(got.to(torch.float64))
    same = (want == got) | (want.isnan() & got.isnan())
    error = torch.where(same, 0.0, (want - got).abs()).nan_to_num(nan=_INF, posinf=_INF)
    finite = want[want.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    max_abs = float(error.max()) if error.numel() else 0.0
    max_rel = max_abs / largest if largest else max_abs
    return Comparison(name, {}, max_abs, max_rel, max_abs <= (0.0 if exact else atol + rtol * largest))


_INF = float("inf")
