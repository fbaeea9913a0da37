"""Settling: which sides of a model's branches on booleans of its inputs a graph has, and where it is right.

A graph that does what the code does for a call in which elements differ, such as a padded one, often serves the other
calls too: a mask without an element that is set changes nothing. So that side is captured first, and compared with the
model's own code on the example. If they differ, or that side cannot be captured, the graph has the example's sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.bases.dtypes import coarsest
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.graph.capturing.sides import Sides
from peftfx.graph.contexts import unchanged
from peftfx.graph.decisions import has_values, opposed
from peftfx.graph.graph import Graph
from peftfx.views.view import as_captured

_TOLERANCE = 1e-4  #: relative to the largest output
_ROUNDINGS = 8  #: of a model's coarsest dtype, where these are more


def on_general_sides(captured: Callable[[Sides], Graph], model: nn.Module, tensors: Mapping[str, Tensor]) -> Graph:
    """Return the graph of a model, with as general sides of its branches as are right for the example.

    Args:
        captured: captures the model with these sides.
        model: the model, called with the tensors in order.
        tensors: the example's inputs by name.

    Raises:
        PeftfxError: the model's code cannot be captured.
    """
    parts = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    held = [tensor for part in parts for _, tensor in part]
    sides = Sides(tensors, _runs(model, tensors), held)
    try:
        graph = captured(sides)
        turned = opposed(graph.decisions, tensors)
        if not turned or _alike(graph, model, tensors):
            return dataclasses.replace(graph, decisions=tuple(d for d in graph.decisions if d not in turned))
    except PeftfxError:
        if not sides.turned:
            raise
    return captured(Sides(tensors, False, held))


def served(graph: Graph, model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a graph is seen to give what the model's own code gives for these inputs."""
    return _runs(model, tensors) and _alike(graph, model, tensors)


def _runs(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    return not model.training and all(has_values(t) for t in (*tensors.values(), *model.parameters()))


def _alike(graph: Graph, model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a graph gives what the model's own code gives for these inputs."""
    with unchanged(model), as_captured(model), torch.no_grad():
        want = model(*(tensor.clone() for tensor in tensors.values()))
        try:
            got = graph.run(*tensors.values())
        except Exception as error:  # an operator of the other side takes no such values
            raise_if_memory_is_out(error)
            return False
    wanted, found = _tensors(pytree.tree_leaves(want)), _tensors(got)
    if len(wanted) != len(found):  # the graph of another side may have other outputs
        return False
    return all(near(one, other, close(model)) for one, other in zip(wanted, found, strict=True))


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def close(model: nn.Module) -> float:
    """Return how far two correct programs of a model may be apart, relative to the largest output.

    In half precision that is some roundings, also of an output in float32: it is made of rounded numbers.
    """
    return max(_TOLERANCE, _ROUNDINGS * torch.finfo(coarsest(model)).eps)


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether the numbers of two tensors differ by at most `tolerance` of the largest, or of 1."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    finite = one[one.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(1.0, largest), equal_nan=True)


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors of one shape. Equal infinities are no difference; NaN is one."""
    one, other = one.double(), other.double()
    gaps = (one - other)[one != other].abs()
    return float(gaps.max()) if gaps.numel() else 0.0
