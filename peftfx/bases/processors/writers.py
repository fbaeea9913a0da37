"""The part of a model that writes text: the model, or a language model that its forward hands arguments on to."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from peftfx.bases.embeddings import input_embeddings


def writer_of(base: nn.Module) -> nn.Module:
    """Return the part of a model that writes text: the model itself, if its forward takes a cache.

    Other classes, whose forward hands arguments that it does not know on to a language model, generate by that model.
    """
    own = inspect.signature(base.forward).parameters
    if "cache" in own or not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return base
    return next((module for module in base.modules() if module is not base and _writes(module, base)), base)


def _writes(module: nn.Module, base: nn.Module) -> bool:
    """Return whether a part of a model generates from the tokens that the model embeds."""
    if not isinstance(module, PreTrainedModel) or not isinstance(base, PreTrainedModel) or not module.can_generate():
        return False
    embeds = input_embeddings(module)
    reads = embeds is not None and embeds is input_embeddings(base)
    return reads and "cache" in inspect.signature(module.forward).parameters
