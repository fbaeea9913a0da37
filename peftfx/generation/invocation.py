"""Invocation (aLoRA): the tokens in a row's text from which on an adapter acts. Before them it does not act.

Before the invocation a row is computed by the base alone, keys and values included, so that the adapter can use a cache
of the base. The place of the invocation is counted from the end of the row, as in HF PEFT's `alora_offsets`: the number
of last tokens from the invocation's first token on; 0 for no invocation. It is found in the tokens of the call. A call
that continues a cache may follow an invocation that is not in its own tokens. So a view with a cache has these numbers
as an input, and the larger number counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.errors import PeftfxError, shown
from peftfx.views.decode import Decode
from peftfx.views.view import Axes

TOKEN_IDS, OFFSETS, ACTIVE = "input_ids", "alora_offsets", "active"
INVOCATION_KEY = "peftfx.invocation"  #: metadata key of an exported model: the tokens after which its adapters act
Invocations = tuple[tuple[int, ...], ...]


def offsets_of(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return how many last tokens of each row of `ids` [batch, length] start at its last invocation, int64[batch]."""
    length = ids.shape[1]
    padded = F.pad(ids, (0, len(tokens) - 1), value=-1)
    places = torch.arange(length, device=ids.device)
    starts = places.expand(ids.shape[0], length)
    for i, token in enumerate(tokens):
        starts = torch.where(padded[:, i : i + length] == token, starts, -1)
    last = starts.amax(1)
    return torch.where(last < 0, 0, length - last)


def active(ids: Tensor, offsets: Tensor | None, tokens: Sequence[int]) -> Tensor:
    """Return where an adapter acts, bool[batch, length, 1]: from the invocation on, or in the last `offsets` tokens."""
    found, length = offsets_of(ids, tokens), ids.shape[1]
    found = found if offsets is None else torch.maximum(found, offsets)
    return (torch.arange(length, device=ids.device) >= length - found[:, None])[..., None]


def where_active(change: Tensor, acts: Tensor) -> Tensor:
    """Keep the change of a layer's output, [batch, length, features], only where `acts` is true.

    Raises:
        PeftfxError: the layer reads the tokens of all rows as one.
    """
    if change.ndim != 3:
        what = (
            f"a layer reads {list(change.shape)}, which does not keep the rows of the batch apart; each "
            "row has an invocation of its own"
        )
        raise PeftfxError(what, "alora_invocation_tokens", "leave out layers that read the tokens of all rows as one")
    if acts.shape[1] != change.shape[1]:
        acts = acts[:, acts.shape[1] - change.shape[1] :]
    return torch.where(acts, change, 0)


def refuse_no_tokens(tokens: Sequence[int]) -> None:
    """Refuse an invocation without tokens."""
    option, hint = "alora_invocation_tokens", "give the tokens of the invocation: tokenizer.encode(...)"
    if not tokens or min(tokens) < 0:
        raise PeftfxError("an aLoRA needs one token or more, each from 0", option, hint)


def as_offsets(value: object, ids: Tensor) -> Tensor:
    """Return the numbers that a call gives for its rows as a tensor. None means 0, as in HF PEFT.

    Raises:
        PeftfxError: the value is not one whole number from 0 for each row.
    """
    numbers = [0 if n is None else n for n in value] if isinstance(value, list | tuple) else value
    try:
        made = torch.as_tensor(numbers, device=ids.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftfxError(f"not whole numbers: {shown(value)}", OFFSETS, "one for each row of the batch") from error
    if made.shape != ids.shape[:1] or made.is_floating_point() or made.dtype == torch.bool or bool((made < 0).any()):
        what = f"not a whole number from 0 for each of {len(ids)} rows: {shown(value)}"
        raise PeftfxError(what, OFFSETS, "how many of a row's last tokens are from its invocation on; 0 for none")
    return made.long()


def invoked(inputs: Mapping[str, Tensor], invocations: Invocations, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs with an invocation in some rows, if there is room. Without invocations no adapter would act."""
    ids = inputs.get(TOKEN_IDS)
    if ids is None or ids.ndim != 2:
        return dict(inputs)
    made, length = ids.clone(), ids.shape[1]
    for i, tokens in enumerate(invocations):
        room = length - len(tokens) + 1
        for row in range(i, len(made), max(2, len(invocations) + 1)) if room > 0 else ():
            at = (seed + row) % room
            made[row, at : at + len(tokens)] = torch.tensor(tokens)
    return {**inputs, TOKEN_IDS: made}


@dataclass(frozen=True)
class InvokedDecode(Decode):
    """A decode view whose adapters act after an invocation. The numbers of its rows are one more input.

    Attributes:
        invocations: the tokens of the adapters' invocations.
    """

    invocations: Invocations = ()

    @property
    def axes(self) -> Axes:
        return {**super().axes, OFFSETS: ("batch",)}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        made = invoked(super().inputs(base, sizes=sizes, seed=seed), self.invocations, seed)
        batch, length = made[TOKEN_IDS].shape
        return {**made, OFFSETS: (torch.arange(batch) + seed) % 3 * length // 2}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        return super().__call__(base, {name: value for name, value in inputs.items() if name != OFFSETS})


def with_offsets(view: object, args: Sequence[object], options: Mapping[str, object]) -> dict[str, object]:
    """Return options of `generate` with the offsets of the prompt's rows, unless they are given."""
    if not isinstance(view, InvokedDecode) or options.get(OFFSETS) is not None:
        return dict(options)
    ids = args[0] if args else options.get(TOKEN_IDS, options.get("inputs"))
    found = [offsets_of(ids, tokens) for tokens in view.invocations] if isinstance(ids, Tensor) else []
    return {**options, OFFSETS: found[0]} if found else dict(options)


def under_invocations(view: Decode, invocations: Invocations) -> Decode:
    """Return a decode view for adapters that act after these invocations.

    Raises:
        PeftfxError: there are several invocations.
    """
    if len(invocations) > 1:
        what = f"adapters of {len(invocations)} invocations act together, and {OFFSETS} of a row is one number"
        raise PeftfxError(what, OFFSETS, "make one active at a time (set_adapter), or use the forward view")
    own = {field.name: getattr(view, field.name) for field in fields(Decode)}
    return InvokedDecode(**own, invocations=invocations) if invocations else view
