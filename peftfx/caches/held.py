"""Held: the named tensors that each layer of a cache keeps between two calls, and the axis along which each grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.errors import PeftfxError

KEY, VALUE, INDEXER = "key", "value", "indexer_key"
#: The axis with an entry for each token. Tensors that are not listed have a fixed size.
_ALONG = {KEY: 2, VALUE: 2, INDEXER: 1}


@dataclass(frozen=True)
class KeptTensor:
    """The name, shape and dtype of one tensor of a cache layer.

    Attributes:
        name: `key` and `value`, [batch, heads, tokens, width]; `indexer_key`, [batch, tokens, width]; or, of fixed
            size, `conv_state`, the last inputs of a convolution, and `recurrent_state`. Further states of a layer are
            numbered: `conv_state_1`.
        shape: the shape after the batch axis; `None` for the axis with an entry for each token.
        dtype: the tensor's dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @staticmethod
    def of(name: str, tensor: Tensor) -> KeptTensor:
        """Return the description of a `tensor` [batch, ...]."""
        along = _ALONG.get(name)
        shape = tuple(None if i == along else int(size) for i, size in enumerate(tensor.shape[1:], 1))
        return KeptTensor(name, shape, tensor.dtype)

    @property
    def along(self) -> int | None:
        """The axis with an entry for each token, counted with the batch; None if the size is fixed."""
        return self.shape.index(None) + 1 if None in self.shape else None

    def sizes(self, batch: int, past: int) -> tuple[int, ...]:
        """Return the tensor's shape after `past` tokens."""
        return (batch, *(past if size is None else size for size in self.shape))

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor before the first token: empty, or zeros."""
        return torch.zeros(self.sizes(batch, 0), dtype=self.dtype, device=device)

    def axes(self, past: str) -> tuple[str | None, ...]:
        """Return a name for each axis. `past` is the name of the axis with an entry for each token."""
        return ("batch", *(past if size is None else None for size in self.shape))


@dataclass(frozen=True)
class Held:
    """The tensors that one cache layer keeps.

    Attributes:
        kept: the layer's tensors; empty if the layer keeps nothing, or reads another layer's tensors.
        window: how many tokens a token attends to, if the model's cache forgets the others and its mask shows them.
    """

    kept: tuple[KeptTensor, ...]
    window: int | None = None

    @property
    def attends(self) -> bool:
        """Whether the layer keeps the keys and values of every token, and nothing else."""
        return [kept.name for kept in self.kept] == [KEY, VALUE]

    @property
    def heads(self) -> int:
        """The number of heads of the layer's keys and values."""
        heads = self.kept[0].shape[0]
        assert heads is not None
        return heads

    @property
    def key(self) -> int:
        """The width of the layer's keys."""
        return self.kept[0].shape[-1]  # type: ignore[return-value]

    @property
    def value(self) -> int:
        """The width of the layer's values."""
        return self.kept[1].shape[-1]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's keys and values."""
        return self.kept[0].dtype


def kept_by(layers: Sequence[Held]) -> list[KeptTensor]:
    """Return all tensors, layer after layer."""
    return [kept for layer in layers for kept in layer.kept]


def cache_names(kind: str, layers: Sequence[Held], part: str = "") -> list[str]:
    """Return names of these layers' tensors, in the order of `kept_by`: `past_key_values.0.key`, ...

    `kind` is the first word. With `part`, the names are of one of a layer's two caches:
    `past_key_values.0.decoder.key`.
    """
    inner = f".{part}" if part else ""
    return [f"{kind}.{i}{inner}.{kept.name}" for i, layer in enumerate(layers) for kept in layer.kept]


def width_of(layers: Sequence[Held]) -> int:
    """Return how many numbers one token has in all layers of a cache of keys and values.

    Raises:
        PeftfxError: a layer keeps something other than keys and values.
    """
    for number, layer in enumerate(layers):
        if not layer.attends:
            names = ", ".join(kept.name for kept in layer.kept) or "nothing"
            what = f"a soft prompt has no place in a cache whose layer {number} keeps {names}"
            raise PeftfxError(what, f"layer {number}", "use the forward view, or a method that acts on weights")
    return sum(layer.heads * (layer.key + layer.value) for layer in layers)
