"""Decisions: the branches of a model's code on booleans of a call's inputs, or of its own buffers, which a captured
program fixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True, eq=False)
class Decision:
    """A boolean that the model's code branches on, and the side that a captured program took.

    Attributes:
        program: computes the boolean from inputs of the call, or from the model's buffers.
        inputs: the names of these inputs, in the program's order. Without any, every call takes the same side for as
            long as the buffers have their values.
        answer: the boolean's value on the side that was taken.
        where: the line of code that asked, such as `file.py:12`.
        text: what that line says, quoted, in brackets.
        told: the boolean in words, if no line of code asks.
        buffers: the model's own buffers that the program reads, if it reads no inputs.
    """

    program: fx.GraphModule = field(repr=False)
    inputs: tuple[str, ...]
    answer: bool
    where: str
    text: str = ""
    told: str = ""
    buffers: tuple[Tensor, ...] = field(default=(), repr=False)

    def of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return the boolean's value in a call.

        Args:
            tensors: the call's inputs by name.
        """
        with torch.no_grad():
            read = (*(tensors[name] for name in self.inputs), *self.buffers)
            found = self.program.forward(*(tensor.detach() for tensor in read))
        return bool(found)

    def met(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the model's code takes the same side in a call. It counts as met for inputs without values."""
        if any(not has_values(tensors[name]) for name in self.inputs):
            return True
        return self.of(tensors) == self.answer

    def __str__(self) -> str:
        if self.told:
            return self.told
        asked = " and ".join(self.inputs) or "the model's buffers"
        return f"the branch at {self.where}{self.text} on {asked} goes as in the example ({self.answer})"


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values that can be read."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def opposed(decisions: Sequence[Decision], tensors: Mapping[str, Tensor]) -> list[Decision]:
    """Return the decisions that the model's code takes otherwise in a call with these inputs."""
    return [decision for decision in decisions if not decision.met(tensors)]
