"""Fixed sides: that images have the values that are constants of their graph, as a decision of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.graph.decisions import Decision
from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.graph.linking import link
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten


def fixed_sides(graph: Graph, fixed: Iterable[FixedValues]) -> Iterator[Decision]:
    """Yield a decision for each fixed argument of images: that each image of a call has these values.

    Args:
        graph: a captured graph. Its inputs have the arguments, with the values of all images one after the other.
        fixed: the values for one image.
    """
    places = dict(
        zip((spec.name for spec in graph.inputs), graph.module.graph.find_nodes(op="placeholder"), strict=True)
    )
    for values in fixed:
        program = _program(values, places[values.name].meta["val"])
        yield Decision(program, (values.name,), True, "", told=f"{values} for each image")


def _program(values: FixedValues, example: torch.Tensor) -> fx.GraphModule:
    rewriter, held = Rewriter(fx.Graph()), nn.Module()
    with unset_fake_temporarily():
        row = torch.tensor(values.numbers, dtype=example.dtype, device=example.device)
    held.register_buffer(values.name, row)
    given = rewriter.placeholder("given", example)
    at = rewriter.end()
    each = at.call(_aten.reshape.default, given, [-1, len(values.numbers)])
    known = row if not isinstance(example, FakeTensor) else example.fake_mode.from_tensor(row, static_shapes=True)
    same = at.call(_aten.eq.Tensor, each, rewriter.attribute(f"{CONSTANTS}.{values.name}", known))
    rewriter.graph.output(at.call(_aten.all.default, same))
    return link(rewriter.graph, {CONSTANTS: held})
