"""Token types: how some models tell the attention which tokens of a text belong to an image or to the prompt.

Such a class makes its masks by `create_masks_for_generate`, which takes `token_type_ids`. The masks are made in the
graph, from the types of all tokens, those of the past included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import Cache

from peftfx.errors import PeftfxError

TYPES = "token_type_ids"
MODALITIES = "mm_token_type_ids"  #: 1 for tokens of an image, from which some models compute positions
_MASKS = "create_masks_for_generate"


def reads_types(base: nn.Module) -> bool:
    """Return whether a model's attention depends on the types of tokens."""
    return TYPES in inspect.signature(base.forward).parameters


def makes_masks(base: nn.Module) -> bool:
    """Return whether a model's class has a function that makes masks from the types of tokens."""
    make = getattr(base, _MASKS, None)
    return make is not None and TYPES in inspect.signature(make).parameters


def typed_masks(base: Any, given: Mapping[str, Tensor], cache: Cache | None) -> Tensor | dict[str, Tensor]:
    """Return the masks of a call, made by the model's own class: one [batch, 1, sequence, total], or one for each kind
    of layer.

    Args:
        base: the model.
        given: `input_ids`, `attention_mask`, `token_type_ids` [batch, total], and perhaps `position_ids`.
        cache: the cache that the call continues.
    """
    made: Tensor | dict[str, Tensor] = getattr(base, _MASKS)(
        config=base.config,
        inputs_embeds=torch.empty(*given["input_ids"].shape, 0, dtype=base.dtype, device=given["input_ids"].device),
        attention_mask=given["attention_mask"],
        cache=cache,
        position_ids=given.get("position_ids"),
        token_type_ids=given[TYPES],
        is_first_iteration=True,
    )
    return made


def prompt_types(base: nn.Module, images: Tensor) -> Tensor:
    """Return types of a prompt's tokens as a processor makes them, int64[batch, sequence].

    Args:
        base: the model; only its class and config are used.
        images: which tokens are of an image, bool[batch, sequence]. They have type 1, if tokens of type 0 are plain
            text; otherwise the whole prompt has type 0, that of a prefix.
    """
    return images.long() if _zeros_are_text(base) else torch.zeros_like(images, dtype=torch.long)


def whole_types(base: nn.Module, given: Tensor | None, tokens: Tensor, before: int) -> Tensor:
    """Return the types of all tokens, int64[batch, before + sequence]. Tokens of the past have type 0.

    Args:
        base: the model; only its class and config are used.
        given: the types of the call's tokens, or of all tokens; None if the caller gives none.
        tokens: the call's tokens, [batch, sequence].
        before: the number of tokens before them.

    Raises:
        PeftfxError: no types are given, and the model does not read tokens of type 0 as plain text.
    """
    batch, length = tokens.shape
    if given is None:
        if not _zeros_are_text(base):
            what = "the model's attention needs the types of the prompt's tokens"
            raise PeftfxError(what, TYPES, "pass what the model's processor makes")
        return torch.zeros(batch, before + length, dtype=torch.long)
    past = torch.zeros(batch, max(before + length - given.shape[1], 0), dtype=torch.long)
    return torch.cat([past, given.long()], dim=1)


def _zeros_are_text(base: nn.Module) -> bool:
    """Return whether a token of type 0 sees no token behind it, as the model's own function of masks says."""
    with unset_fake_temporarily(), torch.device("cpu"):
        text = {name: torch.ones(1, 3, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        made = typed_masks(base, {**text, TYPES: torch.zeros(1, 3, dtype=torch.long)}, None)
    mask = next(iter(made.values())) if isinstance(made, dict) else made
    if mask is None:
        return True
    seen = mask[0, 0, 0, 2]
    return not bool(seen) if mask.dtype == torch.bool else float(seen) < 0
