"""Steps of an encoder-decoder: a text, sound or image is encoded once, and each step attends to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peftfx.caches.cache import cache_of, held
from peftfx.caches.held import cache_names, kept_by
from peftfx.errors import PeftfxError
from peftfx.generation.step import Generates, Step, as_mask, kept_logits, refuse_arguments
from peftfx.views.decode import PAST, PRESENT
from peftfx.views.encoder_decoder import DECODED, ENCODED, TEXT_INPUT, Decoder
from peftfx.views.images.encoded import IMAGE_FEATURES
from peftfx.views.row_adapters import IDS


class SourceEncoder:
    """The encoder that `GenerationMixin` calls. Its output includes the decoder's cross-attention keys and values.

    Attributes:
        encode: the function that runs the encoder's view.
        main_input_name: the name of the argument that is encoded.
    """

    def __init__(self, encode: Step, source: str = TEXT_INPUT) -> None:
        self.encode, self.main_input_name = encode, source

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        adapter_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        **others: object,
    ) -> BaseModelOutput:
        """Return the encoded input, and the keys and values that each decoder layer attends to."""
        given = input_ids if self.main_input_name == TEXT_INPUT else others.pop(self.main_input_name, None)
        refuse_arguments(others)
        if not isinstance(given, Tensor):
            where = self.main_input_name
            raise PeftfxError("the call has nothing for the encoder", where, f"pass {where}")
        mask = self._mask(given, attention_mask)
        rows = {} if adapter_ids is None else {IDS: adapter_ids}
        images = {} if image_features is None else {IMAGE_FEATURES: image_features}
        found = self.encode({self.main_input_name: given, **mask, **images, **rows}, None)
        output = BaseModelOutput(last_hidden_state=found["last_hidden_state"])
        for name, value in {**found, **mask}.items():
            output[name] = value  # stored in the output, as beams and samples repeat all parts of the output
        return output

    def _mask(self, given: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if self.main_input_name == TEXT_INPUT:
            return {"attention_mask": torch.ones_like(given) if mask is None else as_mask(mask)}
        if mask is not None and not bool(mask.all()):
            hint = "give one at a time, or all of one length, without padding"
            raise PeftfxError("the graph of the encoder has no mask: it would read padding too", "attention_mask", hint)
        return {}

    __call__ = forward


class GeneratesFromSource(Generates):
    """A mixin for a class that generates with the views of an encoder-decoder.

    Attributes:
        source_encoder: runs the encoder's view.
    """

    view: Decoder  # type: ignore[assignment]
    source_encoder: SourceEncoder

    def get_encoder(self, modality: str | None = None) -> SourceEncoder:
        """Return the encoder's stand-in, which runs a graph."""
        return self.source_encoder

    def new_caches(self) -> EncoderDecoderCache:
        """Return two empty caches, for decoded tokens and for the encoded source."""
        return EncoderDecoderCache(self.new_cache(), DynamicCache())

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        adapter_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: object,
    ) -> Seq2SeqLMOutput:
        """Return the logits of the decoder's tokens, and the caches with these tokens added."""
        source = self.view.layers.source
        given = input_ids if source == TEXT_INPUT else others.pop(source, None)
        refuse_arguments(others)
        if decoder_input_ids is None or (encoder_outputs is None and given is None):
            where = "decoder_input_ids" if decoder_input_ids is None else source
            raise PeftfxError("the graphs of an encoder-decoder lack an input", where, f"pass {where}")
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            hint = "give prompts of one length to the decoder"
            raise PeftfxError("the decoder's graph has no mask for its own tokens", "decoder_attention_mask", hint)
        if encoder_outputs is None:
            inputs: dict[str, Any] = {source: given, "attention_mask": attention_mask, "adapter_ids": adapter_ids}
            encoder_outputs = self.source_encoder(**inputs)
        if others.get("use_cache") is False or cache is None:
            cache = self.new_caches()
        _check_positions(decoder_position_ids, cache.get_seq_length())
        inputs = self._inputs(decoder_input_ids, attention_mask, encoder_outputs, cache)
        inputs |= {} if adapter_ids is None else {IDS: adapter_ids}
        outputs = self.step(inputs, cache.self_attention_cache)
        own = self.view.layers.own
        made = [outputs[name] for name in cache_names(PRESENT, own, DECODED)]
        cache_of(own, made, cache.self_attention_cache)
        logits = kept_logits(outputs["logits"], logits_to_keep)
        return Seq2SeqLMOutput(logits=logits, cache=cache)

    def _inputs(
        self, tokens: Tensor, mask: Tensor | None, encoded: BaseModelOutput, cache: EncoderDecoderCache
    ) -> dict[str, Tensor]:
        layers = self.view.layers
        cross = cache.cross_attention_cache
        if not held(cross):
            names = cache_names(PRESENT, layers.cross, ENCODED)
            if missing := [name for name in names if name not in encoded]:
                hint = "make them by get_encoder() of this model, or pass input_ids"
                raise PeftfxError("these encoder outputs lack the decoder's keys and values", missing[0], hint)
            cache_of(layers.cross, [encoded[name] for name in names], cross)
        past = held(cache.self_attention_cache)
        if not past:
            past = [kept.empty(len(tokens), tokens.device) for kept in kept_by(layers.own)]
        seen = {}
        if layers.masked:
            seen["encoder_attention_mask"] = as_mask(encoded["attention_mask"] if mask is None else mask)
        return {
            "input_ids": tokens,
            **seen,
            **dict(zip(cache_names(PAST, layers.own, DECODED), past, strict=True)),
            **dict(zip(cache_names(PAST, layers.cross, ENCODED), held(cross), strict=True)),
        }

    def _given_cache(self, given: Cache) -> None:
        if not isinstance(given, EncoderDecoderCache):
            raise PeftfxError(
                "an encoder-decoder needs a cache with two parts", type(given).__name__, "pass an EncoderDecoderCache"
            )
        held(given.self_attention_cache), held(given.cross_attention_cache)

    def _new_generation_cache(self) -> Cache:
        return self.new_caches()


def _check_positions(given: Tensor | None, past: int) -> None:
    """Refuse positions that do not continue those of the decoded tokens, as the graph counts them itself."""
    if given is None:
        return
    counted = torch.arange(past, past + given.shape[-1], device=given.device)
    if not bool((given == counted).all()):
        hint = "leave them out: the graph counts on from what was decoded"
        raise PeftfxError("the decoder's graph takes no positions", "decoder_position_ids", hint)
