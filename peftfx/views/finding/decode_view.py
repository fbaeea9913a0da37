"""Finds the decode view of a causal language model: what its cache holds is seen in a run on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.codebooks import refuse_codes
from peftfx.bases.processors.readers import why_not_read
from peftfx.bases.processors.writers import writer_of
from peftfx.caches.cache import empty_cache, held, layers_in
from peftfx.caches.held import kept_by
from peftfx.caches.windows import noting_windows
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.views.capturing.raised import line_of, said_by
from peftfx.views.decode import Decode, positions
from peftfx.views.dry_run import fake_run
from peftfx.views.images.encoded import Images
from peftfx.views.view import called_with_cache

_FORWARD = "use the forward view"


def decode_view(base: nn.Module, images: Images | None = None) -> Decode:
    """Return the decode view of a causal language model.

    The layers are found by a run on fake tensors, so the model's size costs nothing.

    Args:
        base: the model.
        images: how the model reads images, if it does.

    Raises:
        PeftfxError: the model takes no cache, or a cache that cannot be set and read as tensors.
    """
    writer = writer_of(base)
    accepted = inspect.signature(writer.forward).parameters
    if writer is not base and images is None:
        name = next(path for path, module in base.named_modules() if module is writer)
        what = f"the model's class generates by its {name}, beside which there is no graph of images: "
        raise PeftfxError(what + (why_not_read(base) or "their form is not found"), type(base).__name__, _FORWARD)
    if "cache" not in accepted:
        what = "the model takes no key/value cache: it has no decode view"
        raise PeftfxError(what, type(base).__name__, _FORWARD)
    text = example_inputs(base, sizes={"batch": 2, "sequence": 3})
    if "input_ids" in text:
        refuse_codes(base, text["input_ids"], 2)
    if "attention_mask" not in text:
        what = "the model takes no attention mask, so a batch could not have texts of different lengths"
        raise PeftfxError(what, type(base).__name__, _FORWARD)
    cache = empty_cache(base)
    with fake_run(base) as fake:
        plain = {name: fake(text[name]) for name in ("input_ids", "attention_mask")}
        given: dict[str, Any] = {**plain}
        if writer is not base and images is not None:  # its forward always wants images
            given |= images.encoded(base, torch.zeros(0, images.width, dtype=images.dtype))
        try:
            with noting_windows(base) as windows:
                output = called_with_cache(base, **given, cache=cache)
        except Exception as error:
            raise_if_memory_is_out(error)
            line = "" if said_by(error, "raise") else line_of(error, base)
            said = "its code makes sizes out of the values of tensors" if "SymInt" in str(error) else first_line(error)
            why = f"{said}{', at ' if line else ''}{line}"
            what = f"the model does not run with a plain key/value cache: {why}"
            raise PeftfxError(what, type(base).__name__, _FORWARD) from error
        placed = "position_ids" in accepted and _gives_positions(writer, plain)
        layers = layers_in(cache, windows) if held(cache) else ()
        new_mask = all(tensor.along is None for tensor in kept_by(layers)) and not _runs(base, given, cache, past=3)
    if getattr(output, "logits", None) is None:
        what = "the model gives no logits: its class has no head that writes text"
        raise PeftfxError(what, type(base).__name__, f"load it with its head (AutoModelForCausalLM), or {_FORWARD}")
    if (count := output.logits.shape[1]) > (tokens := text["input_ids"].shape[1]):
        what = f"the model gives logits for {count} tokens where a text has {tokens}: it does not write token by token"
        raise PeftfxError(what, type(base).__name__, _FORWARD)
    if not layers:
        what = "the model leaves its key/value cache empty: it has no decode view"
        raise PeftfxError(what, type(base).__name__, _FORWARD)
    return Decode(layers, placed, new_mask=new_mask)


def _gives_positions(base: nn.Module, given: Mapping[str, Tensor]) -> bool:
    """Return whether the model's class gives positions to its forward when it generates.

    Some classes leave them out, and the code counts in a way of its own: usual positions would be wrong.
    """
    prepare = getattr(base, "prepare_inputs_for_generation", None)
    if prepare is None:
        return True
    counted = {"position_ids": positions(given["attention_mask"])}
    state = {"cache": empty_cache(base), "use_cache": True, "is_first_iteration": True}
    try:
        return prepare(**given, **counted, **state).get("position_ids") is not None
    except Exception as error:  # whatever the class's code raises for a text alone
        raise_if_memory_is_out(error)
        return True


def _runs(base: nn.Module, given: Mapping[str, Tensor], cache: DynamicCache, past: int) -> bool:
    """Return whether the model continues after `past` tokens with a mask that includes these tokens."""
    mask = torch.cat([given["attention_mask"][:, :past], given["attention_mask"]], dim=1)
    try:
        called_with_cache(base, **{**given, "attention_mask": mask}, cache=cache)
    except Exception as error:  # whatever the model's code raises where two sizes differ
        raise_if_memory_is_out(error)
        return False
    return True
