"""Encoder and decoder: the two views in which an encoder-decoder generates, each run with its own graph.

    encoder:  input_ids, attention_mask -> last_hidden_state, present.N.encoder.key/value
    decoder:  input_ids, encoder_attention_mask, past_key_values.N.decoder.key/value,
              past_key_values.N.encoder.key/value -> logits, present.N.decoder.key/value

The encoder's graph computes the decoder's cross-attention keys and values once. So one decoder graph serves the first
token and all others, and no weight is in both graphs, except a shared embedding. The names are those that users of
optimum and ONNX Runtime GenAI know.

A model that encodes sound or an image has `input_features`, `input_values` or `pixel_values` in place of the text, and
no masks: all of the source is attended to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from peftfx.bases.example_inputs import example_inputs
from peftfx.caches.cache import cache_of, held
from peftfx.caches.held import Held, cache_names, kept_by
from peftfx.graph.slots import SLOT_PROMPT
from peftfx.views.decode import PAST, PRESENT
from peftfx.views.view import LONG_TEXT, Axes, RunView, called_with_cache

_SIZES: Mapping[str, int] = {"batch": 2, "encoder_sequence": 7, "sequence": 5, "past": 3}
ENCODED, DECODED = "encoder", "decoder"
TEXT_INPUT = "input_ids"


@dataclass(frozen=True)
class EncoderDecoderLayers:
    """What both views know of the model.

    Attributes:
        own: the layers of the decoder's cache of decoded tokens.
        cross: the layers of the decoder's cache of the encoded source.
        width: the features of an encoded token.
        ahead: how many virtual tokens an example has before its text. The caller's mask does not include them. In a
            call, the encoded length tells their number.
        source: the name of the argument that is encoded.
        source_axes: the names of the source's axes.
        output: the class of the encoder's output. The model's code may read other fields of it than the first.
    """

    own: tuple[Held, ...]
    cross: tuple[Held, ...]
    width: int
    ahead: int = 0
    source: str = TEXT_INPUT
    source_axes: tuple[str | None, ...] = ("batch", "encoder_sequence")
    output: type[ModelOutput] = BaseModelOutput

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments of the encoder: a text comes with its mask."""
        return (self.source, "attention_mask") if self.masked else (self.source,)

    @property
    def masked(self) -> bool:
        """Whether a mask says which encoded tokens are attended to."""
        return self.source == TEXT_INPUT

    def widened(self, mask: Tensor, length: int) -> Tensor:
        """Return the mask of an encoded source of this length, given the mask of the text."""
        count = length - mask.shape[1]
        return torch.cat([mask.new_ones(mask.shape[0], count), mask], 1) if self.ahead else mask


@dataclass(frozen=True)
class Encoder:
    """The view that runs once: it encodes a text, and computes keys and values of it for the decoder's layers."""

    layers: EncoderDecoderLayers
    name = ENCODED
    trials: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"batch": 1, "encoder_sequence": 5},
        {"batch": 3, "encoder_sequence": LONG_TEXT},
        {"batch": 4, "encoder_sequence": 4},
    )

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        return dict.fromkeys(self.layers.inputs, self.layers.source_axes)

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs of this view. If there is room, the last row is padded on the right."""
        wanted = {**_SIZES, **(sizes or {})}
        made = _text(base, wanted["encoder_sequence"], seed, batch=wanted["batch"])
        return {name: made[name] for name in self.layers.inputs}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the encoder, and the parts of the decoder that read only the encoder's output."""
        encoded, cross = _encoded_for(base, inputs, self.encode(base, inputs))
        names = cache_names(PRESENT, self.layers.cross, ENCODED)
        return {"last_hidden_state": encoded, **dict(zip(names, cross, strict=True))}

    def encode(self, base: nn.Module, inputs: Mapping[str, object]) -> Any:
        """Return the output of the model's own encoder."""
        return base.get_encoder()(**inputs, return_dict=True)  # type: ignore[operator]

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the values of the tokens that the mask shows."""
        if not self.layers.masked:
            return value
        rows = value if name == "last_hidden_state" else value.transpose(1, 2)
        return rows[self.layers.widened(inputs["attention_mask"].cpu(), rows.shape[1]) != 0]


@dataclass(frozen=True)
class Decoder:
    """The view of one or more decoder steps over an encoded source."""

    layers: EncoderDecoderLayers
    name = DECODED
    trials: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"batch": 1, "encoder_sequence": 5, "sequence": 1, "past": 0},
        {"batch": 3, "encoder_sequence": 9, "sequence": LONG_TEXT, "past": 0},
        {"batch": 2, "encoder_sequence": 4, "sequence": 3, "past": 6},
        {"batch": 4, "encoder_sequence": 8, "sequence": 1, "past": 7},
    )

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        encoded = "encoder_total" if self.layers.ahead else "encoder_sequence"
        mask = {"encoder_attention_mask": ("batch", "encoder_sequence")} if self.layers.masked else {}
        parts = (DECODED, self.layers.own, "past"), (ENCODED, self.layers.cross, encoded)
        return {
            "input_ids": ("batch", "sequence"),
            **mask,
            **{
                name: kept.axes(length)
                for part, layers, length in parts
                for name, kept in zip(cache_names(PAST, layers, part), kept_by(layers), strict=True)
            },
        }

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs of this view. If there is room, the last row's text is padded on the right."""
        batch, length, sequence, past = ({**_SIZES, **(sizes or {})}[name] for name in _SIZES)
        text = _text(base, length, seed, batch=batch, decoder_sequence=sequence)
        ahead = dict(sizes or {}).get(SLOT_PROMPT, self.layers.ahead) if self.layers.ahead else 0
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            held_by = (DECODED, self.layers.own, past), (ENCODED, self.layers.cross, length + ahead)
            caches = {
                name: torch.randn(kept.sizes(batch, size), generator=random).to(kept.dtype)
                for part, layers, size in held_by
                for name, kept in zip(cache_names(PAST, layers, part), kept_by(layers), strict=True)
            }
        return {
            "input_ids": text["decoder_input_ids"],
            **({"encoder_attention_mask": text["attention_mask"]} if self.layers.masked else {}),
            **caches,
        }

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with keys and values of a random encoded text and of earlier decoded tokens.

        Args:
            base: the model; only its config is read.
            inputs: inputs of this view.
            run: a function that runs the model, also its encoder.
            seed: the seed of the texts.
        """
        layers, mask = self.layers, inputs.get("encoder_attention_mask")
        crossed, own = cache_names(PAST, layers.cross, ENCODED), cache_names(PAST, layers.own, DECODED)
        past, encoded_length = inputs[own[0]].shape[2], inputs[crossed[0]].shape[2]
        length = encoded_length if mask is None else mask.shape[1]
        text = _text(base, length, seed + 1, batch=len(inputs["input_ids"]), decoder_sequence=max(past, 1))
        encoder = Encoder(self.layers)
        source = {self.layers.source: text[self.layers.source]}
        made = run(encoder, source if mask is None else {**source, "attention_mask": mask})
        encoded = zip(crossed, cache_names(PRESENT, layers.cross, ENCODED), strict=True)
        feed = {**inputs, **{name: _behind(inputs[name], made[present]) for name, present in encoded}}
        if not past:
            return feed
        earlier = {**feed, "input_ids": text["decoder_input_ids"], **{n: inputs[n][:, :, :0] for n in own}}
        made = run(self, earlier)
        return {**feed, **dict(zip(own, (made[n] for n in cache_names(PRESENT, layers.own, DECODED)), strict=True))}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the decoder on inputs of this view."""
        given: dict[str, Any] = dict(inputs)
        layers = self.layers
        own = cache_of(layers.own, [given[name] for name in cache_names(PAST, layers.own, DECODED)])
        cross = cache_of(layers.cross, [given[name] for name in cache_names(PAST, layers.cross, ENCODED)])
        first = held(cross)[0]
        shape, mask = (first.shape[0], first.shape[2]), {}
        if self.layers.masked:
            mask["attention_mask"] = self.layers.widened(given["encoder_attention_mask"], first.shape[2])
            shape = (first.shape[0], mask["attention_mask"].shape[1])
        # Only the shape of the encoded source is used: its keys and values are in the cache.
        encoded = first.new_zeros((*shape, self.layers.width), dtype=self.layers.own[0].dtype)
        output = called_with_cache(
            base,
            **mask,
            decoder_input_ids=given["input_ids"],
            encoder_outputs=layers.output(last_hidden_state=encoded),
            cache=EncoderDecoderCache(own, cross),
        )
        names = cache_names(PRESENT, layers.own, DECODED)
        return {"logits": output.logits, **dict(zip(names, held(own), strict=True))}

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the whole value: decoded tokens have no padding."""
        return value


def _text(base: nn.Module, length: int, seed: int, **sizes: int) -> dict[str, Tensor]:
    """Return an example with a text of this length, without the tokens of an image that can come first."""
    made = example_inputs(base, sizes={"sequence": length, **sizes}, seed=seed)
    return {n: v[:, -length:] if n in (TEXT_INPUT, "attention_mask") else v for n, v in made.items()}


def _behind(given: Tensor, made: Tensor) -> Tensor:
    """Put the given keys or values of virtual tokens before those that the model made, if these lack them."""
    ahead = given[:, :, : max(given.shape[2] - made.shape[2], 0)]
    return made if not ahead.shape[2] else torch.cat([ahead * made.std(), made], dim=2)


def _encoded_for(base: nn.Module, inputs: Mapping[str, object], encoded: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the encoded source, and the keys and values that the decoder's layers make of it."""
    given: dict[str, Any] = dict(inputs)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    mask = {name: given[name] for name in ("attention_mask",) if name in given}
    seen = encoded.last_hidden_state
    tokens = given.get(TEXT_INPUT, seen.new_zeros((seen.shape[0], 1), dtype=torch.long))
    called_with_cache(
        base,
        **mask,
        decoder_input_ids=tokens[:, :1],  # any token: outputs that depend on it are not used
        encoder_outputs=encoded,
        cache=cache,
    )
    return encoded.last_hidden_state, held(cache.cross_attention_cache)
