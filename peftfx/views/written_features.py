"""Decode views of models that write encoded images or sounds into embedded text, where the text has tokens for them.

    input_ids, attention_mask, position_ids, the features, past_key_values.N.key/value -> logits, present.N.key/value

In the prefill, the features replace the tokens of images or sounds, in order. A step without such tokens gets features
of length 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.views.decode import Decode
from peftfx.views.view import Axes, RunView

_SOME = 5  #: pieces of an example beside images; enough for a slice of a video


@dataclass(frozen=True)
class WrittenFeatures:
    """What a graph takes in place of images or sounds: a tensor [pieces, width].

    Attributes:
        name: the name of the graph's input.
        axis: the name of its first axis.
        token: the id that stands for a piece in the text.
        width: the features of a piece.
        dtype: the dtype of the features.
        each: how many pieces belong together, if the model needs them so; else None.
    """

    name: str
    axis: str
    token: int
    width: int
    dtype: torch.dtype
    each: int | None = None

    @property
    def few(self) -> int:
        """A small number of pieces that the model takes."""
        return self.each or 3

    def in_text(self, ids: Tensor, columns: slice, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return a text with tokens of pieces at the start of some columns, and random features of as many pieces.

        Args:
            ids: the text, [batch, length].
            columns: where such tokens may stand.
            count: the most pieces; there are only as many as fit into the columns, of whole images.
            seed: the seed of the features.
        """
        ids, each = ids.clone(), self.each or 1
        start, stop, _ = columns.indices(ids.shape[1])
        room = max(stop - start, 0) // each * each
        count = min(count // each * each, len(ids) * room)
        for row in range(len(ids)):
            ids[row, start : start + max(min(room, count - room * row), 0)] = self.token
        random = torch.Generator().manual_seed(seed)
        return ids, torch.randn(count, self.width, generator=random).to(self.dtype)


@dataclass(frozen=True)
class DecodeWithFeatures(Decode, ABC):
    """A decode view with features of images or sounds, which its text has tokens for."""

    @property
    @abstractmethod
    def written(self) -> WrittenFeatures:
        """What the view takes beside a text."""

    @property
    def more(self) -> tuple[WrittenFeatures, ...]:
        """What the view takes beside a text too, each in a text behind what is before it."""
        return ()

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        return {**super().axes, **{own.name: (own.axis, None) for own in (self.written, *self.more)}}

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes for texts without features, with those of each kind, and with all."""
        axis, few = self.written.axis, self.written.few
        none = {own.axis: 0 for own in self.more}
        alone = (
            *({**sizes, axis: 0, **none} for sizes in super().trials[:3]),
            {"batch": 1, "sequence": few + 4, "past": 0, axis: few, **none},
            {"batch": 3, "sequence": few + 2, "past": 2, axis: 2 * few, **none},
        )
        if not self.more:
            return alone
        all_kinds = {axis: 2 * few, **{own.axis: _SOME for own in self.more}}
        return (
            *alone,
            {"batch": 2, "sequence": few + 2 + _SOME * len(self.more), "past": 0, **all_kinds},
            *({"batch": 3, "sequence": 6, "past": 2, axis: 0, **none, own.axis: _SOME + 2} for own in self.more),
        )

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs: a text with tokens of pieces after the first token of each row, and random features.

        If `sizes` are given, there are only as many pieces as the sizes say and as fit after the first token of a row.
        A text without pieces that goes on from a past ends with a token of a piece, if the model can write one.
        """
        written, more = self.written, self.more
        length = written.few + 2 + _SOME * len(more) if more else written.few + 4
        usual = {"batch": 2, "sequence": length, written.axis: 2 * written.few}
        wanted: dict[str, int] = usual | {own.axis: _SOME + 1 for own in more} if sizes is None else {**sizes}
        count, counts = wanted.pop(written.axis, 0), [wanted.pop(own.axis, 0) for own in more]
        made = super().inputs(base, sizes=wanted, seed=seed)
        with unset_fake_temporarily():
            ids, made[written.name] = written.in_text(made["input_ids"], slice(1, None), count, seed)
            if not count and wanted.get("past") and written.token < _embedded(base):
                ids[0, -1] = written.token  # the model wrote it, so it is text
            start = 1 + int((ids == written.token).sum(1).max()) if count else 1
            for place, (own, pieces) in enumerate(zip(more, counts, strict=True)):
                ids, made[own.name] = own.in_text(ids, slice(start, None), pieces, seed + 1 + place)
                start += int((ids == own.token).sum(1).max())
            made["input_ids"] = ids
        return made

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with the past that the model computes for a random text."""
        own = {kind.name: inputs[kind.name] for kind in (self.written, *self.more)}
        none = {name: features[:0] for name, features in own.items()}
        return {**super().with_past(base, {**inputs, **none}, run, seed), **own}


def _embedded(base: nn.Module) -> int:
    """Return how many tokens a model embeds."""
    return int(getattr(base.get_input_embeddings(), "num_embeddings", 0))  # type: ignore[operator]
