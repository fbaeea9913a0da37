"""What a graph whose rows choose adapters is compared with: the model, with the adapter of each row alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftfx.errors import raise_if_memory_is_out
from peftfx.export.deployment.deployment import Inputs
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.slots.encoders import ENCODED_APART
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.choices import rows_of_answer
from peftfx.export.verification.comparison import Reference, reference_of
from peftfx.export.verification.eager.reference import EagerReference, no_oracle
from peftfx.export.verification.oracle import named_in, numbers_in
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.views.capturing.settling import near
from peftfx.views.row_adapters import IDS, WithRowAdapters


def chooses_by_row(part: GraphPart) -> bool:
    """Say whether the rows of a graph choose adapters. Encoders of images and sounds may have nothing to choose."""
    return any(spec.name == IDS for spec in part.graph.inputs)


def encodes_apart(part: GraphPart) -> bool:
    """Say whether a graph encodes what is beside a text."""
    return part.view is not None and part.view.name in ENCODED_APART


def each_under_its_own(part: GraphPart, alone: Sequence[Reference]) -> Reference:
    """Make the reference of a graph: each row, or each call of an encoder, is computed with only its own adapter.

    Args:
        part: the graph that is compared with the reference.
        alone: the model with only one adapter, for each adapter; and last the model without adapters.
    """
    return _under_its_own(alone) if encodes_apart(part) else _each_alone(part, alone)


def _each_alone(part: GraphPart, alone: Sequence[Reference]) -> Reference:
    """Make the reference in which each row is computed by the model with only that row's adapter."""
    together, along = reference_of(Evaluate()(part.graph).graph), _rows_in_outputs(part.graph)

    def run(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, view = feed[IDS], part.view
        found = together(feed)  # padding, which is not compared, keeps these values
        for number in sorted(set(ids.tolist())):
            rest = {name: value for name, value in feed.items() if name != IDS}
            rest = view.alone(feed, number) if isinstance(view, WithRowAdapters) else rest
            with rows_of_answer(ids == number):
                answer = alone[number](rest)
            for name, value in answer.items():
                own = found[name][tuple(slice(size) for size in value.shape)]
                rows = (*(slice(None) for _ in range(along[name])), ids == number) if name in along else ...
                own[rows] = value[rows]
        return found

    return run


def _under_its_own(alone: Sequence[Reference]) -> Reference:
    """Make the reference of a graph in which one adapter acts in a whole call; see `_each_alone`."""

    def run(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        (number,) = feed[IDS].tolist()
        return dict(alone[number]({name: value for name, value in feed.items() if name != IDS}))

    return run


def _rows_in_outputs(graph: Graph) -> dict[str, int]:
    """Return the axis along the rows of the batch, by the names of outputs. Features of images may have none.

    It is behind another axis in the products of all images with all texts.
    """
    placeholders = [node for node in graph.nodes() if node.op == "placeholder"]
    numbered = next(i for i, spec in enumerate(graph.inputs) if spec.name == IDS)
    rows = str(placeholders[numbered].meta["val"].shape[0])
    values = pytree.tree_leaves(graph.module.graph.output_node().args[0])
    made = {
        name: value.meta["val"]
        for name, value in zip(onnx_outputs(graph), values, strict=True)
        if hasattr(value, "meta")
    }
    sizes = {name: [*map(str, value.shape)] for name, value in made.items() if isinstance(value, Tensor)}
    return {name: own.index(rows) for name, own in sizes.items() if rows in own}


def model_alone(adapted: AdaptedModel, part: GraphPart, names: tuple[str, ...], example: Inputs) -> Reference:
    """Return the model under these adapters as a function, by its own code if possible, otherwise by its graph."""
    acting = adapted.named.acting_as
    with acting(names):
        if not no_oracle(adapted):
            own = named_in(part.graph, EagerReference(adapted, part.seen, example))
        else:
            graph = adapted.graph if part.seen is None else lambda _: adapted.graph(view=part.seen)
            own = lambda feed: reference_of(graph(feed))(feed)  # noqa: E731

    def run(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        with acting(names):
            return own(feed)

    return run


def mixed_in(part: GraphPart, model: Reference, call: Tensors, tolerance: float) -> str:
    """Say how a model mixes the rows of a batch, as by statistics of the batch; empty if it does not, or does not tell.

    Args:
        part: a graph whose rows choose adapters.
        model: the model without adapters.
        call: the inputs of the graph.
        tolerance: how far two correct programs may be apart, relative to the largest magnitude.
    """
    (axis,) = next(spec.shape for spec in part.graph.inputs if spec.name == IDS)
    rows = {spec.name: spec.shape.index(axis) for spec in part.graph.inputs if axis in spec.shape}
    rest = {name: value for name, value in call.items() if name != IDS}
    rest = part.view.alone(call, -1) if isinstance(part.view, WithRowAdapters) else rest
    first = {name: value.narrow(rows[name], 0, 1) if name in rows else value for name, value in rest.items()}
    try:
        together, alone = model(rest), model(first)
    except Exception as error:  # a model's code raises various errors for a size that it does not take
        raise_if_memory_is_out(error)
        return ""
    along = _rows_in_outputs(part.graph)
    own = (name for name, at in along.items() if not near(together[name].narrow(at, 0, 1), alone[name], tolerance))
    mixed = next(own, None)
    what = "the model's code mixes the rows of a batch, so each cannot have its own adapter"
    return "" if mixed is None else f"{what}: {mixed} of a row alone differs from that in a batch"


def with_ids(graph: Graph, cases: Sequence[Mapping[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Add adapter numbers to calls of a graph: the rows take the adapters, and none, in turn.

    If there are fewer rows than adapters, the call with most rows is made again, until each adapter has a row.
    """
    (axis,) = next(spec.shape for spec in graph.inputs if spec.name == IDS)
    known = next(spec.name for spec in graph.inputs if spec.shape[:1] == (axis,) and spec.name != IDS)
    widest = max(cases, key=lambda case: case[known].shape[0])
    made, given = list[dict[str, Tensor]](), 0
    for case in chain(cases, repeat(widest)):
        if len(made) >= len(cases) and given > count:
            break
        rows = case[known].shape[0]
        made.append({**case, IDS: (torch.arange(given, given + rows) % (count + 1)) - 1})
        given += rows
    return made


def covering(cases: Sequence[Tensors]) -> tuple[int, ...]:
    """Return the numbers of calls, the largest first, in whose rows there are all adapters that any call has."""
    seen, found = set[int](), list[int]()
    for number in sorted(range(len(cases)), key=lambda i: -numbers_in(cases[i])):
        if not seen.issuperset(own := cases[number][IDS].tolist()):
            seen.update(own)
            found.append(number)
    return tuple(found)
