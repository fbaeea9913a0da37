"""Stand-ins: a model of a base's own class whose forward is a graph's.

What the class has of its own for generation stays: inputs that it prepares, tokens that it forces and suppresses, long
recordings that it takes piece by piece.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from peftfx.generation.step import Generates


def over_graphs(base: nn.Module, way: type[Generates], **parts: object) -> Any:
    """A model of the base's own class, over the base's own tensors, whose forward is `way`'s.

    Args:
        base: the model, whose class generates.
        way: its forward.
        parts: what `way` needs: attributes.
    """
    kind = _class(type(base), way)  # type: ignore[arg-type]
    made = kind.__new__(kind)
    # Its own namespace over the base's own tables of modules and parameters: nothing is copied or registered.
    vars(made).update(vars(base))
    vars(made).update(parts)
    return made


@functools.cache
def _class(base: type[nn.Module], way: type[Generates]) -> Any:
    made = type(f"Generating{base.__name__}", (way, base), {"__module__": __name__})

    def forward(self: Generates, *args: object, **kwargs: object) -> object:
        named = inspect.signature(base.forward).bind(self, *args, **kwargs).arguments
        named.pop("self")
        named |= named.pop("kwargs", {})
        return way.forward(self, **named)

    # transformers reads there what the model takes: whether positions, and how many logits.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    setattr(made, "forward", forward)  # noqa: B010
    return made
