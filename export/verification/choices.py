"""Choices: the places where a graph goes on with the largest of some scores, as routers choose experts, or sorts them.

Where two scores are nearly equal, correct programs may choose differently, and then their outputs differ by far more
than rounding. Such a model is compared in two pieces, before and behind its choices:

1. ONNX Runtime's scores are as near to float64 as torch's are, within `NEAR` times;
2. what it chose is the largest of its own scores, exactly, and in their order where they are sorted;
3. its outputs are those of a reference that goes on with the same choices, within the usual tolerance.

The float64 that both are measured by follows the same choices, so a difference of choices makes no tolerance wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.export.verification.tolerances.tolerance import FLOOR, Tensors

NEAR = 4  #: how many times as far from float64 as torch's scores ONNX Runtime's may be
_NAME = ".choices.onnx"
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
_TOPK = torch.ops.aten.topk.default
_ARGUMENTS = {
    _TOPK: ("self", "k", "dim", "largest", "sorted"),
    torch.ops.aten.sort.default: ("self", "dim", "descending"),
    torch.ops.aten.sort.stable: ("self",),
}


@dataclass(frozen=True)
class ShownChoices:
    """A copy of a saved model that gives its scores and its choices, too.

    Attributes:
        path: the copy, over the same weights.
        names: the outputs that hold the scores and the places of the largest, for each choice in the graph's order.
        half: whether the model computes something in float16.
    """

    path: Path
    names: tuple[tuple[str, str], ...]
    half: bool

    def taken(self, got: Mapping[str, Tensor]) -> list[TakenChoice]:
        """Return the choices of a call, given its outputs."""
        return [TakenChoice(got[scores], got[places]) for scores, places in self.names]


@dataclass(frozen=True)
class TakenChoice:
    """The scores of a call at one place, and the places of those that were chosen."""

    scores: Tensor
    places: Tensor


@contextmanager
def shown_choices(path: Path) -> Iterator[ShownChoices | None]:
    """Yield a copy of a saved model that shows its choices, or None if it makes none, or makes some in a branch.

    The copy's file is removed afterwards.
    """
    proto = onnx.load(path, load_external_data=False)
    values = (*proto.graph.value_info, *proto.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = [node for node in proto.graph.node if node.op_type == "TopK" and types.get(node.input[0]) in _FLOATS]
    for number, node in enumerate(nodes):
        if len(node.output) < 2 or not node.output[1]:  # nothing in the graph reads the places
            node.output[:] = [node.output[0], f"choice.{number}.places"]
    names = tuple((node.input[0], node.output[1]) for node in nodes)
    if not names or any(map(_chooses, _inner(proto.graph))):
        yield None
        return
    known = {output.name for output in proto.graph.output}
    wanted = {scores: types[scores] for scores, _ in names} | {places: onnx.TensorProto.INT64 for _, places in names}
    more = [onnx.helper.make_tensor_value_info(n, kind, None) for n, kind in wanted.items() if n not in known]
    proto.graph.output.extend(more)
    copy = path.with_name(_NAME)
    try:
        onnx.save(proto, copy)
        yield ShownChoices(copy, names, onnx.TensorProto.FLOAT16 in types.values())
    finally:
        copy.unlink(missing_ok=True)


def _inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs of a graph's branches and loops."""
    for node in graph.node:
        for a in node.attribute:
            yield from (*a.graphs, *([a.g] if a.HasField("g") else ()))


def _chooses(graph: onnx.GraphProto) -> bool:
    return any(node.op_type == "TopK" for node in graph.node) or any(map(_chooses, _inner(graph)))


_ROWS: ContextVar[Tensor | None] = ContextVar("_ROWS", default=None)


@contextmanager
def rows_of_answer(rows: Tensor) -> Iterator[None]:
    """Run a call of a reference from which only some rows of a batch go into its answer: so do their scores.

    Args:
        rows: for each row of the batch, whether it goes into the answer.
    """
    before = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(before)


def _with_rows(scores: Tensor, known: Tensor | None) -> Tensor:
    """Return the scores of an answer, of which a call gives some rows, and earlier calls the others."""
    rows = _ROWS.get()
    if rows is None or known is None or known.shape != scores.shape or scores.shape[0] % len(rows):
        return scores
    own = rows.repeat_interleave(scores.shape[0] // len(rows))  # routers list the tokens, row by row
    return torch.where(own.view(-1, *[1] * (scores.ndim - 1)), scores, known)


@dataclass
class Following:
    """A reference that goes on with given choices, in the order in which it makes its own.

    Attributes:
        reference: the reference.
        choices: the choices.
        scores: the reference's own scores in its last answer.
        alike: whether its code has made as many choices as are given, each of as many scores.
        wrong: which given choice, counted from 1, is not of the largest of its scores; 0 if none is.
    """

    reference: Callable[[Tensors], Tensors]
    choices: Sequence[TakenChoice]
    scores: dict[int, Tensor] = field(default_factory=dict)
    alike: bool = True
    wrong: int = 0

    def __call__(self, feed: Tensors) -> Tensors:
        self.scores = {}
        mode = _Follows(self)
        with mode:
            answer = self.reference(feed)
        self.alike &= mode.count > 0 and mode.count % len(self.choices) == 0  # some references call the model again
        return answer

    def takes(self, number: int, scores: Tensor, count: int, axis: int, largest: bool, ordered: bool) -> Tensor | None:
        """Return the places that choice `number` takes of the scores; None, if it is none of these."""
        place = number % len(self.choices)
        given = self.choices[place]
        self.scores[place] = _with_rows(scores, self.scores.get(place))
        found, own = given.scores, scores.shape
        self.alike &= found.shape == own and given.places.shape == (*own[:axis], count, *own[axis + 1 :])
        if not self.alike:
            return None
        both = found.topk(count, axis, largest).values, found.gather(axis, given.places)
        best, taken = (values if ordered else values.sort(axis).values for values in both)
        if not torch.equal(best.nan_to_num(), taken.nan_to_num()):
            self.wrong = 1 + place
        return given.places.clone()


class _Follows(TorchDispatchMode):
    def __init__(self, following: Following) -> None:
        super().__init__()
        self.following = following
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ARGUMENTS or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        usual = {"dim": -1, "largest": True, "descending": False}
        given = {**usual, **dict(zip(_ARGUMENTS[func], args, strict=False)), **(kwargs or {})}
        scores, sorts = given["self"], func is not _TOPK
        axis, largest = given["dim"] % max(1, scores.ndim), given["descending" if sorts else "largest"]
        count = scores.shape[axis] if sorts else given["k"]
        places = self.following.takes(self.count, scores, count, axis, largest, sorts)
        self.count += 1
        return func(*args, **(kwargs or {})) if places is None else (scores.gather(axis, places), places)


def unpadded_scores(scores: Tensor, feed: Tensors) -> Tensor:
    """Return the scores of the tokens of a call that are no padding, whose scores mean nothing.

    Args:
        scores: the scores of each token of the call, row by row; others are returned as they are.
        feed: the inputs of the call.
    """
    ids, mask = feed.get("input_ids"), feed.get("attention_mask")
    if ids is None or mask is None or ids.ndim != 2 or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
        return scores
    tokens = scores.flatten(0, 1) if scores.shape[:2] == ids.shape else scores
    shown = mask[:, -ids.shape[1] :].flatten() != 0  # behind those of the past
    return tokens[shown] if len(tokens) == len(shown) else scores


@dataclass
class Nearness:
    """How far scores are from float64, over all calls: the largest difference at each choice, of the largest score.

    Attributes:
        runtime: the scores of ONNX Runtime.
        torch: the reference's own scores.
        comparable: whether the scores were finite at the same places in all calls.
    """

    runtime: dict[int, float] = field(default_factory=dict)
    torch: dict[int, float] = field(default_factory=dict)
    comparable: bool = True

    def learn(
        self, choices: Sequence[TakenChoice], own: Mapping[int, Tensor], exact: Mapping[int, Tensor], feed: Tensors
    ) -> None:
        """Record the scores of a call: of ONNX Runtime, and of the reference in its own dtype and in float64.

        Args:
            choices: the scores and choices of ONNX Runtime.
            own, exact: those of the reference, in its own dtype and in float64.
            feed: the inputs of the call.
        """
        for number, choice in enumerate(choices):
            best = unpadded_scores(exact[number], feed).double()
            finite = best.isfinite()
            scale = best[finite].abs().amax().clamp(min=torch.finfo(torch.float32).tiny) if finite.any() else 1.0
            for found, known in ((choice.scores, self.runtime), (own[number], self.torch)):
                scores = unpadded_scores(found, feed)
                self.comparable &= torch.equal(finite, scores.isfinite())
                far = (scores.double() - best)[finite].abs() / scale
                known[number] = max(known.get(number, 0.0), float(far.amax()) if far.numel() else 0.0)

    @property
    def too_far(self) -> str:
        """The first choice whose scores are further from float64 than `NEAR` times what torch's own are; or nothing."""
        if not self.comparable:
            return "an infinity or NaN on one side alone"
        least = FLOOR * torch.finfo(torch.float32).eps
        wrong = (n for n in sorted(self.runtime) if not self.runtime[n] <= NEAR * self.torch[n] + least)
        first = next(wrong, None)
        if first is None:
            return ""
        told = f"{self.runtime[first]:.2g} of the largest from float64, where torch is {self.torch[first]:.2g}"
        return f"choice {first + 1} of {len(self.runtime)} is {told}"
