"""Token types: how some models tell the attention which tokens of a text belong to an image or to the prompt.

Such a class makes its masks by `create_masks_for_generate`, which takes `token_type_ids`. The masks are made in the
graph, from the types of all tokens, those of the past included. Other classes have such a function for
`mm_token_type_ids`, on which the masks depend with some configs. Their forward makes these masks itself.
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
MODALITIES = "mm_token_type_ids"  #: 1 for tokens of an image, from which some models compute positions or masks
_MASKS = "create_masks_for_generate"


def reads_types(base: nn.Module) -> bool:
    """Return whether a model's attention depends on the types of tokens."""
    return TYPES in inspect.signature(base.forward).parameters or types_of_masks(base) == MODALITIES


def types_of_masks(base: nn.Module) -> str:
    """Return the argument of a forward from whose types of tokens it makes masks; empty if there is none."""
    name = _name_of_types(base)
    return name if name in inspect.signature(base.forward).parameters and _changes_masks(base) else ""


def makes_masks(base: nn.Module) -> bool:
    """Return whether a model's class has a function that makes masks from the types of tokens."""
    return bool(_name_of_types(base))


def _name_of_types(base: nn.Module) -> str:
    """Return the argument of the function of masks that types are passed as; empty if it takes none."""
    make = getattr(base, _MASKS, None)
    accepted = () if make is None else inspect.signature(make).parameters
    return next((name for name in (TYPES, MODALITIES) if name in accepted), "")


def typed_call(base: Any, given: Mapping[str, Any], cache: Cache | None) -> dict[str, Any]:
    """Return the arguments of a call in which tokens see each other by their types, given these as `token_type_ids`."""
    rest = {name: value for name, value in given.items() if name != TYPES}
    if TYPES in inspect.signature(base.forward).parameters:
        return {**rest, "attention_mask": typed_masks(base, given, cache)}
    return {**rest, MODALITIES: given[TYPES]}


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
        is_first_iteration=True,
        **{_name_of_types(base): given[TYPES]},
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


def plain_type(base: nn.Module) -> int:
    """Return the type of a token that sees no token behind it; 0 if the model's attention depends on no types."""
    return 0 if not makes_masks(base) or _zeros_are_text(base) else 1


def _zeros_are_text(base: nn.Module) -> bool:
    """Return whether a token of type 0 sees no token behind it, as the model's own function of masks says."""
    mask = next(iter(_masks_of(base, 0).values()))
    if mask is None:
        return True
    seen = mask[0, 0, 0, 2]
    return not bool(seen) if mask.dtype == torch.bool else float(seen) < 0


def _changes_masks(base: nn.Module) -> bool:
    """Return whether tokens of type 1 see others than tokens of type 0 do."""
    zeros, ones = (_masks_of(base, value).values() for value in (0, 1))
    pairs = list(zip(zeros, ones, strict=True))
    return any(b is not None and (a is None or not torch.equal(a, b)) for a, b in pairs)


def _masks_of(base: nn.Module, value: int) -> dict[str, Tensor | None]:
    """Return the masks of three tokens of one type, by the kind of layer."""
    with unset_fake_temporarily(), torch.device("cpu"):
        text = {name: torch.ones(1, 3, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        made = typed_masks(base, {**text, TYPES: torch.full((1, 3), value)}, None)
    return {**made} if isinstance(made, dict) else {"": made}
