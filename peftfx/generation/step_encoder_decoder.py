"""Stepping from text: the same for encoder-decoders, whose text is encoded once and attended to at every step."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peftfx.errors import PeftfxError
from peftfx.generation.step import Generates, Step, refuse_arguments
from peftfx.views.cache import cache_of, fill_cache, held
from peftfx.views.decode import PAST, PRESENT, cache_names
from peftfx.views.encoder_decoder import DECODED, ENCODED, Decoder
from peftfx.views.row_adapters import IDS


class TextEncoder:
    """What `GenerationMixin` takes for the model's encoder. Its output carries the decoder's keys and values along."""

    main_input_name = "input_ids"

    def __init__(self, encode: Step) -> None:
        self.encode = encode

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapter_ids: Tensor | None = None,
        **others: object,
    ) -> BaseModelOutput:
        """The encoded text, and what each of the decoder's layers attends to in it."""
        refuse_arguments(others)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = {} if adapter_ids is None else {IDS: adapter_ids}
        found = self.encode({"input_ids": input_ids, "attention_mask": mask.long(), **rows}, None)
        output = BaseModelOutput(last_hidden_state=found["last_hidden_state"])  # type: ignore[call-arg, arg-type]
        for name, value in found.items():
            output[name] = value  # a part of it: beams and samples repeat all parts
        output["attention_mask"] = mask
        return output

    __call__ = forward


class GeneratesFromText(Generates):
    """A class that generates with the views of an encoder-decoder.

    Attributes:
        text_encoder: runs the encoder's.
    """

    view: Decoder  # type: ignore[assignment]
    text_encoder: TextEncoder

    def get_encoder(self, modality: str | None = None) -> TextEncoder:
        """The encoder's graph."""
        return self.text_encoder

    def new_caches(self) -> EncoderDecoderCache:
        """Two empty caches: of what is decoded, and of the encoded text."""
        return EncoderDecoderCache(self.new_cache(), cache_of([]))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        adapter_ids: Tensor | None = None,
        **others: object,
    ) -> Seq2SeqLMOutput:
        """Logits for the decoder's tokens, and the caches with these in it."""
        refuse_arguments(others)
        if decoder_input_ids is None or (encoder_outputs is None and input_ids is None):
            where = "decoder_input_ids" if decoder_input_ids is None else "input_ids"
            raise PeftfxError("the graphs of an encoder-decoder read tokens", where, "pass token ids")
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            hint = "give prompts of one length to the decoder"
            raise PeftfxError("the decoder's graph has no mask for its own tokens", "decoder_attention_mask", hint)
        if encoder_outputs is None:
            assert input_ids is not None
            encoder_outputs = self.text_encoder(input_ids, attention_mask, adapter_ids)
        if others.get("use_cache") is False or cache is None:
            cache = self.new_caches()
        inputs = self._inputs(decoder_input_ids, attention_mask, encoder_outputs, cache)
        inputs |= {} if adapter_ids is None else {IDS: adapter_ids}
        outputs = self.step(inputs, cache.self_attention_cache)
        names = cache_names(PRESENT, len(self.view.layers.own), part=DECODED)
        fill_cache(cache.self_attention_cache, [outputs[name] for name in names])
        return Seq2SeqLMOutput(logits=outputs["logits"], cache=cache)  # type: ignore[call-arg, arg-type]

    def _inputs(
        self, tokens: Tensor, mask: Tensor | None, encoded: BaseModelOutput, cache: EncoderDecoderCache
    ) -> dict[str, Tensor]:
        layers = self.view.layers
        cross = cache.cross_attention_cache
        if not held(cross):
            names = cache_names(PRESENT, len(layers.cross), part=ENCODED)
            if missing := [name for name in names if name not in encoded]:
                hint = "make them by get_encoder() of this model, or pass input_ids"
                raise PeftfxError("these encoder outputs lack the decoder's keys and values", missing[0], hint)
            fill_cache(cross, [encoded[name] for name in names])
        past = held(cache.self_attention_cache)
        if not past:
            past = [
                torch.zeros(len(tokens), layer.heads, 0, width, dtype=layer.dtype, device=tokens.device)
                for layer in layers.own
                for width in (layer.key, layer.value)
            ]
        if mask is None:
            mask = encoded["attention_mask"]
        return {
            "input_ids": tokens,
            "encoder_attention_mask": mask.long(),
            **dict(zip(cache_names(PAST, len(layers.own), part=DECODED), past, strict=True)),
            **dict(zip(cache_names(PAST, len(layers.cross), part=ENCODED), held(cross), strict=True)),
        }

    def _given_cache(self, given: Cache) -> None:
        if not isinstance(given, EncoderDecoderCache):
            raise PeftfxError("an encoder-decoder has two caches", type(given).__name__, "pass an EncoderDecoderCache")
        held(given.self_attention_cache), held(given.cross_attention_cache)

    def _new_generation_cache(self) -> Cache:
        return self.new_caches()
