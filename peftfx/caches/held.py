"""Held: what each layer of a cache keeps between two calls, as named tensors, and how each of them grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.errors import PeftfxError

KEY, VALUE, INDEXER = "key", "value", "indexer_key"
#: The axis of each tensor that has an entry for each token; one that is not here has a fixed size.
_ALONG = {KEY: 2, VALUE: 2, INDEXER: 1}


@dataclass(frozen=True)
class KeptTensor:
    """One tensor of a layer.

    Attributes:
        name: `key` and `value`, [batch, heads, tokens, width]; `indexer_key`, [batch, tokens, width]; of fixed sizes
            `conv_state`, what a convolution saw last, and `recurrent_state`; `conv_state_1` where a layer has several.
        shape: behind the batch; `None` where there is an entry for each token.
        dtype: of it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @staticmethod
    def of(name: str, tensor: Tensor) -> KeptTensor:
        """What this tensor is, [batch, ...]."""
        along = _ALONG.get(name)
        shape = tuple(None if i == along else int(size) for i, size in enumerate(tensor.shape[1:], 1))
        return KeptTensor(name, shape, tensor.dtype)

    @property
    def along(self) -> int | None:
        """The axis with an entry for each token, counted with the batch; `None` where the size is fixed."""
        return self.shape.index(None) + 1 if None in self.shape else None

    def sizes(self, batch: int, past: int) -> tuple[int, ...]:
        """The shape behind so many tokens."""
        return (batch, *(past if size is None else size for size in self.shape))

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """What there is before the first token: nothing, or zeros."""
        return torch.zeros(self.sizes(batch, 0), dtype=self.dtype, device=device)

    def axes(self, past: str) -> tuple[str | None, ...]:
        """A name for each axis, given that of the one with an entry for each token."""
        return ("batch", *(past if size is None else None for size in self.shape))


@dataclass(frozen=True)
class Held:
    """What one layer keeps.

    Attributes:
        kept: its tensors; none where it keeps nothing, or reads another layer's.
    """

    kept: tuple[KeptTensor, ...]

    @staticmethod
    def keys_and_values(heads: int, key: int, value: int, dtype: torch.dtype) -> Held:
        """Keys of this width and values of that one, of each token."""
        return Held(
            tuple(KeptTensor(name, (heads, None, width), dtype) for name, width in ((KEY, key), (VALUE, value)))
        )

    @property
    def attends(self) -> bool:
        """Whether it keeps the keys and values of every token, and nothing else."""
        return [kept.name for kept in self.kept] == [KEY, VALUE]

    @property
    def heads(self) -> int:
        """Of its keys and values."""
        heads = self.kept[0].shape[0]
        assert heads is not None
        return heads

    @property
    def key(self) -> int:
        """The width of its keys."""
        return self.kept[0].shape[-1]  # type: ignore[return-value]

    @property
    def value(self) -> int:
        """The width of its values."""
        return self.kept[1].shape[-1]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of its keys and values."""
        return self.kept[0].dtype


def kept_by(layers: Sequence[Held]) -> list[KeptTensor]:
    """All tensors, layer after layer."""
    return [kept for layer in layers for kept in layer.kept]


def cache_names(kind: str, layers: Sequence[Held], part: str = "") -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ... of these layers, in the order of `kept_by`.

    With a part, one of a layer's two caches: `past_key_values.0.decoder.key`.
    """
    inner = f".{part}" if part else ""
    return [f"{kind}.{i}{inner}.{kept.name}" for i, layer in enumerate(layers) for kept in layer.kept]


def width_of(layers: Sequence[Held]) -> int:
    """What one token has in all layers of a cache of keys and values.

    Raises:
        PeftfxError: a layer keeps something else.
    """
    for number, layer in enumerate(layers):
        if not layer.attends:
            names = ", ".join(kept.name for kept in layer.kept) or "nothing"
            what = f"a soft prompt has no place in a cache whose layer {number} keeps {names}"
            raise PeftfxError(what, f"layer {number}", "use the forward view, or a method that acts on weights")
    return sum(layer.heads * (layer.key + layer.value) for layer in layers)
