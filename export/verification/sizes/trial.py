"""Trials: a captured graph beside the model's own code, at chosen sizes of a call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.bases.dtypes import is_half
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.export.verification.eager.kept_state import run_kept
from peftfx.export.verification.sizes.declared import has_declared_sizes
from peftfx.export.verification.tolerances.float64 import MOST_EXACT, float64
from peftfx.graph.conditions import Condition, completed
from peftfx.graph.graph import Graph
from peftfx.views.capturing.settling import near
from peftfx.views.sounds.encoded import SOUND_LENGTH

Sized = Mapping[str, int]
Fed = dict[str, Tensor]
Make = Callable[[Sized], Fed]
Eager = Callable[[Fed], Sequence[Tensor]]
SAME, TAKES_NO_OTHER = "same", "the model takes no other"  #: answers to a trial
TAKES_ONE = "the model takes a size of 1 there, too; this export does not"
BRANCHES = "beyond, the model computes something else"
DECLARES = "the export declares other sizes of tensors inside"
#: Axes that run along texts.
_TOKENS = frozenset({"sequence", "decoder_sequence", "encoder_sequence", "encoder_total", "past", "total"})
#: The most tokens (rows, pixels) of a tried call; the most tokens times parameters; and the fewest tokens, for a large
#: model.
MOST_ROWS, MOST_WORK, LEAST_ROWS = 4096, 2 << 30, 8
_LENGTHS = 2048  #: how many lengths of recordings are asked for
_ROUNDING = 2e-6  #: a difference of float32 results that is rounding alone, relative to the largest magnitude


@dataclass(frozen=True)
class Trial:
    """A captured graph and the eager model, to be compared at chosen sizes.

    Attributes:
        graph: the graph of the base, captured as for the export.
        make: makes inputs, given the sizes of named axes. It raises an error if there are no such inputs.
        eager: runs the model's own code, and returns outputs like the graph's. It raises an error if the model does not
            take the sizes.
        shown: selects what to compare of an output, given its name, the inputs and its value.
        usual: the sizes of all other axes in a call.
        parameters: the number of the model's parameters.
        longest: the number of tokens that the model is made for, by its config, without those of a soft prompt.
        left: the axes along which the graph is not run at a size of 1, because the export itself is compared there.
    """

    graph: Graph
    make: Make
    eager: Eager
    shown: Callable[[str, Fed, Tensor], Tensor]
    usual: Sized
    parameters: int
    longest: int | None = None
    left: frozenset[str] = frozenset()

    def is_of_images(self, condition: Condition) -> bool:
        """Say whether a condition is only on the sizes of images. A model is made for one size of images."""
        images = [spec.shape[2:] for spec in self.graph.inputs if len(spec.shape) > 3 and spec.dtype.is_floating_point]
        return bool(condition.axes) and set(condition.axes) <= {axis for shape in images for axis in shape} - _TOKENS

    def is_of_most_sounds(self, condition: Condition) -> bool:
        """Say whether a condition is only on the length of recordings beside a text, and most lengths meet it."""
        if condition.axes != (SOUND_LENGTH,):
            return False
        least = self.usual.get(SOUND_LENGTH, 1)
        lengths = range(least, least + _LENGTHS)
        return 2 * sum(condition.met({SOUND_LENGTH: length}) for length in lengths) > len(lengths)

    def is_of_long_texts(self, condition: Condition) -> bool:
        """Say whether a condition holds for all texts that the model is made for, with their past."""
        if self.longest is None or not condition.axes or not set(condition.axes) <= _TOKENS:
            return False
        texts = (s for s in condition.tried() if s.get("past", 0) + max(s.values()) <= self.longest)
        return all(map(condition.met, texts))

    def tells(self, condition: Condition, sizes: Sized) -> bool:
        """Say whether a wrong answer at these sizes is due to this condition: conditions on other axes hold there."""
        others = (c for c in self.graph.conditions if not c.relation and not set(c.axes) & set(condition.axes))
        return all(other.met(sizes) for other in others)

    def affords(self, sizes: Sized) -> bool:
        """Say whether a call of these sizes is small enough to be tried."""
        most = max(LEAST_ROWS, min(MOST_ROWS, MOST_WORK // max(1, self.parameters)))
        return self._rows(sizes) <= most

    def affords_near(self, sizes: Sized) -> bool:
        """Say whether a call of these sizes can be tried: it is small, or not twice as large as the usual call."""
        return self.affords(sizes) or self._rows(sizes) <= 2 * self._rows(self.usual)

    def _rows(self, sizes: Sized) -> int:
        return max((math.prod(sizes.get(axis, 1) for axis in axes) for axes in self._free), default=1)

    @functools.cached_property
    def _free(self) -> frozenset[tuple[str, ...]]:
        """The free axes of the inputs, each distinct set once: keys and values of all layers have the same axes."""
        return frozenset(tuple(axis for axis in spec.shape if isinstance(axis, str)) for spec in self.graph.inputs)

    def whole(self, sizes: Sized) -> dict[str, int]:
        """Complete some sizes with the usual sizes of all other axes, or small ones if such a call is too large."""
        found = completed(self.graph.conditions, sizes, self.usual)
        return found if self.affords(found) else completed(self.graph.conditions, sizes, self._small)

    @functools.cached_property
    def _small(self) -> dict[str, int]:
        """The least size of each axis, from 2, that is known to meet the conditions on this axis alone."""
        small = dict.fromkeys(self.usual, 2)
        for condition in self.graph.conditions:
            if len(condition.axes) == 1 and not condition.met(small):
                (axis,) = condition.axes
                met = [tried[axis] for tried in condition.tried() if condition.met(tried)]
                larger = (size for size in (*met, self.usual[axis]) if size > small[axis])
                small[axis] = min(larger, default=self.usual[axis])
        return small

    def reach(self, condition: Condition, sizes: Sized) -> Fed | None:
        """Make inputs of these sizes that do not meet a condition. Return None if there are no such inputs."""
        try:
            case = self.make(sizes)
        except PeftfxError:
            return None
        return None if condition.met(self.graph.sizes_of(case)) else case

    def takes(self, sizes: Sized) -> bool:
        """Say whether a call of these sizes is small enough to be tried, and the model's own code runs it."""
        return self.affords(sizes) and self.runs(lambda: self.make(sizes))

    def runs(self, made: Callable[[], Fed]) -> bool:
        """Say whether inputs can be made, and the model's own code runs them."""
        try:
            self.eager(made())
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            return False
        return True

    def answer(self, case: Fed, condition: Condition | None = None) -> str:
        """Run the model and the graph on these inputs, and say whether they agree or the model refuses.

        If they are on the other side of a condition that only a size of 1 breaks, the graph may not be run: see `left`.
        """
        try:
            want = self.eager(case)
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            return TAKES_NO_OTHER
        if condition is not None and condition.edge and set(condition.axes) <= self.left:
            return SAME
        try:
            with torch.no_grad():
                got = self._run(case)
        except Exception as error:  # an operator of the graph has a fixed size
            raise_if_memory_is_out(error)
            return BRANCHES
        if not self._agree(case, want, got, _ROUNDING):
            usual = self._agree(case, want, got, self._usual)
            exact = self._same_in_float64(case) if usual or self._is_half else None
            if exact is False or not (usual or exact):
                return BRANCHES
        return SAME if condition is None or condition.code or self._has_declared_sizes(case) else DECLARES

    @functools.cached_property
    def _is_half(self) -> bool:
        """Whether the model is in half precision. Its roundings add up, and may choose other experts."""
        return is_half(self.graph.base)

    @property
    def _usual(self) -> float:
        """How far the model and the graph may be apart in the model's own dtype, where float64 does not decide."""
        return 2e-2 if self._is_half else 1e-4

    def _run(self, case: Fed) -> Sequence[object]:
        return run_kept(self.graph.run, self.graph, case)

    def _has_declared_sizes(self, case: Fed) -> bool:
        """Say whether the tensors inside the graph have the sizes that the graph declares, for these inputs.

        Torch's operators broadcast a size of 1 whatever the capture found out of a size. ONNX Runtime believes the
        declared sizes, and uses memory again for what is as large.
        """
        with torch.no_grad():
            return run_kept(functools.partial(has_declared_sizes, self.graph.module), self.graph, case)

    def _agree(self, case: Fed, want: Sequence[Tensor], got: Sequence[object], bound: float) -> bool:
        named = [(name, b) for name, b in zip(self.graph.outputs, got, strict=True) if isinstance(b, Tensor)]
        if len(want) != len(named):  # code that cuts a tensor into parts may give more of them at other sizes
            return False
        pairs = zip(want, named, strict=True)
        return all(_same(a, b, functools.partial(self.shown, name, case), bound) for a, (name, b) in pairs)

    def _same_in_float64(self, case: Fed) -> bool | None:
        """Say whether the model and the graph agree in float64: a difference that is more than rounding stays there.

        If the model is too large for it, or cannot be run in float64, there is no answer.
        """
        if self.parameters > MOST_EXACT:
            return None
        try:
            with torch.no_grad(), float64():
                want, got = self.eager(case), self._run(case)
        except Exception as error:  # such as an operator without float64 in a model's own code
            raise_if_memory_is_out(error)
            return None
        return self._agree(case, want, got, _ROUNDING)


def _same(want: Tensor, got: Tensor, shown: Callable[[Tensor], Tensor], bound: float) -> bool:
    return want.shape == got.shape and near(shown(want), shown(got), bound)
