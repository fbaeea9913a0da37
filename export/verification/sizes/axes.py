"""The axes that a saved model declares, of its inputs and of what it returns."""

from __future__ import annotations

from pathlib import Path

import onnx

from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.graph.graph import Graph
from peftfx.serving.onnx_model import OnnxModel


def axes_in(path: Path) -> dict[str, tuple[int | str, ...]]:
    """Return the shape of each input and output of a saved model. An axis whose size is free is a string."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    return {name: tuple(d.dim_param or d.dim_value for d in dims) for name, dims in shapes.items()}


def refuse_other_inputs(model: OnnxModel, graph: Graph) -> None:
    """Refuse a model whose inputs, without its slots, are not a graph's: their names and axes."""
    axes = model.axes
    fixed = [spec for spec in graph.inputs if spec.name not in model.slots]
    wrong = [f"{spec} is {list(axes.get(spec.name, ()))}" for spec in fixed if axes.get(spec.name) != spec.shape]
    if wrong:
        what = f"the ONNX model's inputs differ from the graph's: {'; '.join(wrong)}"
        raise VerificationError(what, str(model.path), "export it again")


def refuse_other_sizes(model: OnnxModel, feed: Tensors, got: Tensors) -> None:
    """Refuse a model that declares other axes of an output than it has in a call: runtimes plan memory by the names.

    An axis whose name no input has, such as the number of tokens that an image makes, may have any size.
    """
    axes = model.axes
    inputs = [(axes[name], value.shape) for name, value in feed.items() if name in axes]
    sizes = {axis: size for own, shape in inputs for axis, size in zip(own, shape, strict=True)}
    for name, value in got.items():
        given = list(value.shape)
        told = [axis if isinstance(axis, int) else sizes.get(axis) for axis in axes[name]]
        if len(told) != len(given) or any(size not in (None, own) for size, own in zip(told, given, strict=True)):
            what = f"the model declares {name} {list(axes[name])}, and what it gives is {given}"
            raise VerificationError(what, str(model.path), "report this model")
