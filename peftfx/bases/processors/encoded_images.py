"""What a model's image encoder gives: where in its output the features of an image's pieces are.

Most models read the features for the text from `pooler_output`; some have no such field and read `last_hidden_state`.
Some have further fields with features for deeper layers, or these alone. Such a field is a list with an entry for each
layer: features, or a pair of the layer's number and features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

POOLED = "pooler_output"
_FIRST = (POOLED, "last_hidden_state")
_OTHERS = {*_FIRST, "hidden_states", "attentions"}

#: The names of fields with features for deeper layers, each with its layers' numbers; None for one that is not told.
Deeper = tuple[tuple[str, tuple[int | None, ...]], ...]


@dataclass(frozen=True)
class FoundFeatures:
    """Where the features are in the output of an encoder that has run.

    Attributes:
        field: the field with the text's features; empty if there are those for deeper layers alone.
        listed: whether they are a list with an entry for each image.
        first: the features of the first image, or of all images if they are one tensor.
        deeper: the fields with features for deeper layers.
        idle: other fields, which hold no tensor.
    """

    field: str
    listed: bool
    first: Tensor
    deeper: Deeper
    idle: tuple[str, ...]

    @staticmethod
    def of(output: Any) -> FoundFeatures:
        """Return where the features are in an output."""
        field, pooled = main_features(output)
        listed = not isinstance(pooled, Tensor)
        first = pooled[0] if listed else pooled
        return FoundFeatures(field, listed, first, _deeper_features(output, first), _idle_fields(output))

    @property
    def width(self) -> int:
        """The width of a piece: that of its features for the text, and of those for each deeper layer."""
        return int(self.first.shape[-1]) * (bool(self.field) + sum(len(layers) for _, layers in self.deeper))


def main_features(output: Any) -> tuple[str, Any]:
    """Return the name of the field that the text's features are in, and what it holds.

    If there are features for deeper layers alone, the name is empty, and what is returned is for the first layer.
    """
    for name in _FIRST:
        if (found := getattr(output, name, None)) is not None:
            return name, found
    layers = next(value for name, value in vars(output).items() if name not in _OTHERS and _is_list(value))
    return "", _numbered(layers[0])[1]


def _idle_fields(output: Any) -> tuple[str, ...]:
    """Return the names of fields of an encoder's output that hold nothing, or the whole output of a part of it."""
    others = {name: value for name, value in vars(output).items() if name not in _OTHERS}
    return tuple(name for name, value in others.items() if value is None or isinstance(value, ModelOutput))


def _deeper_features(output: Any, first: Tensor) -> Deeper:
    """Return the fields that are lists of features for layers, of the shape of `first`."""
    fields = [
        (n, [_numbered(v) for v in value]) for n, value in vars(output).items() if n not in _OTHERS and _is_list(value)
    ]
    return tuple(
        (name, tuple(number for number, _ in layers))
        for name, layers in fields
        if all(isinstance(v, Tensor) and v.shape == first.shape for _, layer in layers for v in by_image(layer))
    )


def joined_features(output: Any, deeper: Deeper = ()) -> Tensor:
    """Return the features of each piece, [pieces, width]: those for the text, then those for deeper layers."""
    name, first = main_features(output)
    found = [torch.cat([part.flatten(0, -2) for part in by_image(first)])] if name else []
    layers = [_numbered(layer)[1] for field, _ in deeper for layer in getattr(output, field)]
    found += [torch.cat(by_image(layer)).flatten(0, -2) for layer in layers]
    return torch.cat(found, -1) if len(found) > 1 else found[0]


def by_image(value: Any) -> list[Tensor]:
    """Return the features of each image, given them or all features in one tensor."""
    return [value] if isinstance(value, Tensor) else list(value)


def _numbered(layer: Any) -> tuple[int | None, Any]:
    """Return the number of a layer and the features for it."""
    told = isinstance(layer, tuple) and len(layer) == 2 and type(layer[0]) is int
    return layer if told else (None, layer)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(part is not None for part in value)
