"""Decode: the view of a causal language model for generation, with its key/value cache as plain tensors.

    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value

One graph serves prefill (a past of length 0), continuation and single tokens, for any batch, padded on either side:
mask and positions are inputs. The names are those that users of ONNX Runtime know. Other tensors that a layer keeps
have names of the same form: `past_key_values.N.conv_state` and `.recurrent_state`, of fixed size and zero before the
first token, and `.indexer_key`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from peftfx.bases.example_inputs import example_inputs
from peftfx.caches.cache import cache_of, empty_cache, held
from peftfx.caches.held import Held, cache_names, kept_by
from peftfx.views.view import LONG_TEXT, Axes, RunView, called_with_cache

PAST, PRESENT = "past_key_values", "present"
_SIZES: Mapping[str, int] = {"batch": 2, "sequence": 5, "past": 3}
_TRIALS: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "sequence": 5, "past": 0},
    {"batch": 3, "sequence": LONG_TEXT, "past": 0},
    {"batch": 2, "sequence": 3, "past": 6},
    {"batch": 4, "sequence": 1, "past": 7},
    {"batch": 1, "sequence": 1, "past": 1},
)
_TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")
#: A prefill that leaves the longest past of all trials.
_LONGEST = {"batch": max(s["batch"] for s in _TRIALS), "sequence": max(s["past"] for s in _TRIALS), "past": 0}


@dataclass(frozen=True)
class Decode:
    """The decode view of a causal model.

    Attributes:
        layers: what each layer of the model's cache holds.
        positions: whether the model takes `position_ids`. Other models compute positions from the mask or the past.
        new_mask: whether the model takes a mask of the call's own tokens, without those of the past.
    """

    layers: tuple[Held, ...]
    positions: bool
    new_mask: bool = field(default=False, kw_only=True)
    name = "decode"

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        text: dict[str, tuple[str | None, ...]] = {
            "input_ids": ("batch", "sequence"),
            "attention_mask": ("batch", "total"),
        }
        if self.positions:
            text["position_ids"] = ("batch", "sequence")
        kept = zip(self.past_names, kept_by(self.layers), strict=True)
        return {**text, **{name: tensor.axes("past") for name, tensor in kept}}

    @property
    def past_names(self) -> list[str]:
        """The names of the inputs that hold the cache."""
        return cache_names(PAST, self.layers)

    @property
    def present_names(self) -> list[str]:
        """The names of the outputs that hold the new cache, in the same order."""
        return cache_names(PRESENT, self.layers)

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs of this view. If there is room, the last row is padded on the left.

        Args:
            base: the model; only its config is read.
            sizes: the sizes of `batch`, `sequence` and `past` that differ from `_SIZES`.
            seed: the seed of the random values.
        """
        batch, sequence, past = ({**_SIZES, **(sizes or {})}[name] for name in _SIZES)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            mask = torch.ones(batch, past + sequence, dtype=torch.long)
            if batch > 1 and past + sequence > 2:
                mask[-1, :2] = 0
            made = {"input_ids": _unpadded(base, batch, sequence, seed), "attention_mask": mask}
            if self.positions:
                made["position_ids"] = positions(mask)[:, past:].contiguous()
            for name, tensor in zip(self.past_names, kept_by(self.layers), strict=True):
                values = torch.randn(tensor.sizes(batch, past), generator=random)
                made[name] = (values if past else torch.zeros_like(values)).to(tensor.dtype)
            return made

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with the past that the model computes for a random text with the same padding.

        Args:
            base: the model; only its config is read.
            inputs: inputs of this view.
            run: a function that runs the model.
            seed: the seed of the text.
        """
        past = _past(inputs)
        if not past:
            return dict(inputs)
        mask, kept = inputs["attention_mask"][:, :past], kept_by(self.layers)
        made = self._shared_past(base, inputs, mask, run)
        if made is None:
            made = self._own_past(base, inputs, mask, run, seed)
        found = dict(inputs)
        for name, present, tensor in zip(self.past_names, self.present_names, kept, strict=True):
            found[name] = made[present]
            if tensor.along is not None:  # cache entries of padding do not matter, but a NaN in them would spread
                found[name] = found[name].movedim(tensor.along, 1)
                hidden = (mask == 0).view(*mask.shape, *[1] * (found[name].ndim - 2))
                found[name] = found[name].masked_fill(hidden, 0.0).movedim(1, tensor.along)
        return found

    @property
    def rows_of_positions(self) -> tuple[int, ...]:
        """The axes of positions before the batch: none, if a token has one position."""
        return ()

    def positions_of(self, mask: Tensor) -> Tensor:
        """Return the positions of all tokens of a text, as the model takes them."""
        return positions(mask)

    def _shared_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor, run: RunView
    ) -> Mapping[str, Tensor] | None:
        """Return a part of the longest past of all trials, for which `run` gets the same inputs each time.

        Return None if the past is no part of it: if it is longer, is padded otherwise, or has tensors of a fixed size.
        A call with more inputs than a text has its past made alone.
        """
        if self.has_states or set(inputs) - {*_TEXT_INPUTS, *self.past_names}:
            return None
        text = self.inputs(base, sizes=_LONGEST)
        (batch, past), longest = mask.shape, text["attention_mask"]
        rows = next((r for r in (slice(-batch, None), slice(batch)) if torch.equal(longest[r, :past], mask)), None)
        if rows is None:
            return None
        made, found = run(self, text), {}
        for present, tensor in zip(self.present_names, kept_by(self.layers), strict=True):
            assert tensor.along is not None
            if made[present].shape[tensor.along] != longest.shape[1]:
                return None
            found[present] = made[present][rows].narrow(tensor.along, 0, past).contiguous()
        return found

    def _own_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor, run: RunView, seed: int
    ) -> Mapping[str, Tensor]:
        """Return the past of a random text of the past's own size."""
        batch, past = mask.shape
        text = _unpadded(base, batch, past, seed + 1)
        kept = zip(self.past_names, kept_by(self.layers), strict=True)
        none = {name: tensor.empty(batch) for name, tensor in kept}
        feed = {**inputs, "input_ids": text, "attention_mask": mask, **none}
        if self.positions:
            feed["position_ids"] = self.positions_of(mask)
        return run(self, feed)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        past: list[Any] = [given.pop(name) for name in self.past_names]
        if not torch.compiler.is_exporting():
            if self.has_states and not _past(inputs):  # type: ignore[arg-type]
                return self._run(base, given, empty_cache(base))  # a state of zeros is not the same
            kept = zip(past, kept_by(self.layers), strict=True)  # some code writes into states in place
            past = [value.clone() if tensor.along is None else value for value, tensor in kept]
        return self._run(base, given, cache_of(self.layers, past))

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a tensor without an entry for each token."""
        return any(tensor.along is None for tensor in kept_by(self.layers))

    def _run(self, base: nn.Module, given: Mapping[str, object], cache: DynamicCache) -> dict[str, Tensor]:
        if self.new_mask:
            mask, text = given["attention_mask"], given["input_ids"]
            assert isinstance(mask, Tensor)
            assert isinstance(text, Tensor)
            given = {**given, "attention_mask": mask[:, mask.shape[1] - text.shape[1] :]}
        output = called_with_cache(base, **given, cache=cache)
        return {"logits": output.logits, **dict(zip(self.present_names, held(cache), strict=True))}

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the logits, or the cache entries, of the tokens that the mask shows. States are returned whole."""
        mask = inputs["attention_mask"].cpu() != 0
        if name == "logits":
            return value[mask[:, mask.shape[1] - value.shape[1] :]]
        along = next(t.along for n, t in zip(self.present_names, kept_by(self.layers), strict=True) if n == name)
        return value if along is None else value.movedim(along, 1)[mask]

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes for a prefill, a continuation, and single tokens, alone and in a batch padded on the left."""
        return _TRIALS


def _unpadded(base: nn.Module, batch: int, sequence: int, seed: int) -> Tensor:
    """Return random tokens, int64[batch, sequence], without the last row of an example, which is padded.

    Image tokens, which are before an example's text, are left out too.
    """
    made = example_inputs(base, sizes={"batch": batch + 1, "sequence": sequence}, seed=seed)["input_ids"]
    return made[:batch, made.shape[1] - sequence :]


def _past(inputs: Mapping[str, Tensor]) -> int:
    return inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]


def positions(mask: Tensor) -> Tensor:
    """Return each token's position among the tokens that the mask shows; 0 for padding, as in `generate`."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
