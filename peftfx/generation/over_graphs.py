"""Stand-ins: models of the base's own class whose forward runs a graph.

The class's own code for generation is still used: it prepares inputs, forces and suppresses tokens, and splits long
recordings.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from peftfx.bases.processors.writers import writer_of
from peftfx.generation.step import Generates


def over_graphs(base: nn.Module, way: type[Generates], **parts: object) -> Any:
    """Return a model of the base's class, over the base's tensors, whose forward is that of `way`.

    Args:
        base: the model, whose class generates.
        way: the mixin whose forward is used.
        parts: the attributes that `way` needs.
    """
    kind = _class(type(base), type(writer_of(base)), way)  # type: ignore[arg-type]
    made = kind.__new__(kind)
    # The model has its own attributes, but the base's tables of modules and parameters: nothing is copied or
    # registered.
    vars(made).update(vars(base))
    vars(made).update(parts)
    return made


@functools.cache
def _class(base: type[nn.Module], writer: type[nn.Module], way: type[Generates]) -> Any:
    made = type(f"Generating{base.__name__}", (way, base), {"__module__": __name__})
    signature = _signature(base, writer)

    def forward(self: Generates, *args: object, **kwargs: object) -> object:
        named = signature.bind(self, *args, **kwargs).arguments
        named.pop("self")
        named |= named.pop("kwargs", {})
        return way.forward(self, **named)

    # transformers reads from the signature whether the model takes positions, and a number of logits.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    setattr(made, "forward", forward)  # noqa: B010
    return made


def _signature(base: type[nn.Module], writer: type[nn.Module]) -> inspect.Signature:
    """Return the signature of a forward, with the arguments that it hands on to the model that writes the text."""
    own = inspect.signature(base.forward)
    if writer is base:
        return own
    this, *rest = own.parameters.values()
    optional = [
        p.replace(default=None) if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD else p for p in rest
    ]
    handed = [p for n, p in inspect.signature(writer.forward).parameters.items() if n not in own.parameters]
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in handed if p.kind is p.POSITIONAL_OR_KEYWORD]
    return own.replace(parameters=[this, *optional[:-1], *named, optional[-1]])
