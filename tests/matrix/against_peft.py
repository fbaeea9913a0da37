"""A cell against HF PEFT: it loads what we saved, computes the same, and what it saves comes back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import peft
import torch
from support.parity import apart, changed, farthest, outputs
from torch import Tensor, nn

from peftfx.model.adapted import AdaptedModel

Calls = Sequence[dict[str, Tensor]]


class PeftCannot(Exception):
    """HF PEFT cannot load this adapter on this model, or cannot run it."""


def compared(
    ours: AdaptedModel, base: nn.Module, made: Path, calls: Calls, tolerance: float
) -> tuple[float, Literal["equal", "alone", "differs"], str]:
    """How far HF PEFT's outputs are from ours where they are equal, and a note where they are not everywhere.

    Raises:
        PeftCannot: HF PEFT cannot do it; AssertionError: it can, and the difference has no known reason.
    """
    theirs, note = _loaded(base, made / "adapter", calls)
    status: Literal["equal", "alone", "differs"] = "alone" if note else "equal"
    if not any(changed(outputs(theirs, call), outputs(base, call)) for call in calls):
        raise PeftCannot("HF PEFT's model of a task that it does not know leaves the prompt out, silently.")
    errors = [farthest(outputs(ours, call), outputs(theirs, call), call) for call in calls]
    if max(errors) > tolerance:
        padded = _only_padding(ours, theirs, calls, tolerance)
        status, note, errors = "differs", f"{note}; {padded}" if note else padded, [0.0]
    theirs.save_pretrained(str(made / "theirs"))
    want = [outputs(ours, call) for call in calls]
    ours.load_adapter(made / "theirs", "back")
    for call, value in zip(calls, want, strict=True):
        assert farthest(outputs(ours, call), value, call) <= tolerance, "what peft saved again is not what it loaded"
    ours.remove("back")
    return max(errors), status, note


def _loaded(base: nn.Module, adapter: Path, calls: Calls) -> tuple[nn.Module, str]:
    """HF PEFT's model, run once; where it stops, the same with its old name of the cache understood, and a note."""
    reason = ""
    for mend in (False, True):
        copied = copy.deepcopy(base)
        if mend and not _mended(copied):
            break
        try:
            theirs = peft.PeftModel.from_pretrained(copied, str(adapter)).eval()
            for call in calls:
                outputs(theirs, call)
            return theirs, f"{reason} With the argument that it looks for renamed, it is equal." if mend else ""
        except Exception as error:  # of any kind: it is HF PEFT's, or the model's under it
            reason = reason or _first(error)
    raise PeftCannot(reason)


def _mended(base: nn.Module) -> bool:
    """Let a model take its cache by the name that HF PEFT has for it; whether it did not already."""
    forward: Callable[..., object] = base.forward
    parameters = inspect.signature(forward).parameters
    if "past_key_values" in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False

    @functools.wraps(forward)
    def renamed(*args: object, past_key_values: object = None, **kwargs: object) -> object:
        return forward(*args, **kwargs, **({} if past_key_values is None else {"cache": past_key_values}))

    extra = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    kept = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    renamed.__signature__ = inspect.Signature([*kept, extra])  # type: ignore[attr-defined]
    base.forward = renamed  # type: ignore[method-assign]
    return True


def _only_padding(ours: AdaptedModel, theirs: nn.Module, calls: Calls, tolerance: float) -> str:
    """Check that outputs differ in padded rows alone, and that ours there are those of each row on its own."""
    for call in calls:
        mask = call["attention_mask"]
        full = {**call, "attention_mask": torch.ones_like(mask)}
        full["input_ids"] = call["input_ids"][:1].expand_as(call["input_ids"])
        off = farthest(outputs(ours, full), outputs(theirs, full), full)
        assert off <= tolerance, f"HF PEFT is {off:.1e} away, and nothing is padded"
        together = outputs(ours, call)
        for row, length in enumerate(mask.sum(1)):
            own = {
                n: v[row : row + 1, : int(length)] if v.shape == mask.shape else v[row : row + 1]
                for n, v in call.items()
            }
            alone = outputs(ours, own)
            off = max(apart(alone[n], together[n][row : row + 1, : alone[n].shape[1]]) for n in alone)
            assert off <= tolerance * max(1.0, *(float(v.abs().max()) for v in alone.values()))
    return "rows that are padded: HF PEFT's answer depends on the padding, ours is the row's own"


def _first(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return first if first.endswith(".") else f"{first}."
