"""Finds the layers of an encoder-decoder's caches by a run on fake tensors."""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.codebooks import refuse_codes
from peftfx.caches.cache import held, layers_in
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.views.dry_run import fake_run
from peftfx.views.encoder_decoder import TEXT_INPUT, EncoderDecoderLayers
from peftfx.views.images.sizes import free_images
from peftfx.views.view import called_with_cache, name_axes


def find_layers(base: nn.Module) -> EncoderDecoderLayers:
    """Return the layers of an encoder-decoder's caches, found by a run on fake tensors.

    Raises:
        PeftfxError: the model is no encoder-decoder, or its caches are not keys and values.
    """
    accepted = inspect.signature(base.forward).parameters
    text = example_inputs(base, sizes={"batch": 2, "sequence": 3})
    if "decoder_input_ids" in text:
        refuse_codes(base, text["decoder_input_ids"], 2)
    source = str(getattr(base, "main_input_name", TEXT_INPUT))
    if source not in text and hasattr(base, "get_encoder"):  # a name for whatever the encoder takes
        source = str(getattr(base.get_encoder(), "main_input_name", source))  # type: ignore[operator]
    needed = {source, "decoder_input_ids", "encoder_outputs", "cache"} | (
        {"attention_mask"} if source == TEXT_INPUT else set()
    )
    if not needed <= set(accepted) or not hasattr(base, "get_encoder"):
        missing = ", ".join(sorted(needed - set(accepted))) or "get_encoder"
        what = f"the model cannot be split into an encoder and a decoder: its forward has no {missing}"
        raise PeftfxError(what, type(base).__name__, "use the forward view")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with fake_run(base) as fake:
        given = {name: fake(t) for name, t in text.items() if name in needed}
        tokens = given.pop("decoder_input_ids")
        mask = {name: given[name] for name in ("attention_mask",) if name in given}
        try:
            encoded = base.get_encoder()(**given, return_dict=True)  # type: ignore[operator]
            called_with_cache(base, **mask, decoder_input_ids=tokens, encoder_outputs=encoded, cache=cache)
            for part in (cache.self_attention_cache, cache.cross_attention_cache):
                held(part)  # this refuses unknown kinds of layers
            own, cross = layers_in(cache.self_attention_cache), layers_in(cache.cross_attention_cache)
            width = int(encoded.last_hidden_state.shape[-1])
        except Exception as error:
            raise_if_memory_is_out(error)
            what = f"the model does not run with plain key/value caches: {first_line(error)}"
            raise PeftfxError(what, type(base).__name__, "use the forward view") from error
    if not own or len(own) != len(cross):
        what = "a layer of the model's decoder lacks a cache of decoded tokens or one of the encoded source"
        raise PeftfxError(what, type(base).__name__, "use the forward view")
    layers = EncoderDecoderLayers(own, cross, width, output=type(encoded))
    if source == TEXT_INPUT:
        return layers
    axes = free_images(name_axes({source: text[source]}), base)[source]
    return replace(layers, source=source, source_axes=axes)
