"""Finds whether sounds can be written into the embedded text that a forward hands on, beside images or none.

The forward is run on fake tensors, with sounds and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.processors.sounds.in_forward import COMPARES
from peftfx.errors import first_line, raise_if_memory_is_out
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.handed.arguments import are_tokens
from peftfx.views.finding.handed.text import ValueKeys, handed_on
from peftfx.views.sounds.encoded import EMBEDDED, Sounds

_TEXT, _MASK = "input_ids", "attention_mask"


class _AnyNumber(TorchFunctionMode):
    """Code that compares how many tokens a text has with a number of features that is not known finds them equal."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in COMPARES and not args[0].ndim and isinstance(args[1], torch.SymInt):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return torch.tensor(True)
        return func(*args, **(kwargs or {}))


def why_not_handed(base: nn.Module, ids: Tensor, given: Mapping[str, Tensor], sounds: Sounds) -> str:
    """Return why features of sounds cannot be written into the embedded text that a forward hands on, or nothing.

    The forward has to write the features, in order, at the tokens of sounds, into what it would hand on without them,
    and to hand the result on, with the same other arguments.

    Args:
        base: the model; it is run on fake tensors.
        ids: a text with the tokens of sounds.
        given: the recordings and their masks.
        sounds: how the model reads sounds.
    """
    with fake_run(base) as fake:
        mask, heard = fake(torch.ones_like(ids)), {name: fake(value) for name, value in given.items()}
        try:
            with known_values([ids]), _AnyNumber(), ValueKeys() as keys:
                own = handed_on(base, keys, {_TEXT: ids, _MASK: mask, **heard})
                other = handed_on(base, keys, {_TEXT: ids, _MASK: mask})
        except Exception as error:  # whatever the model's code raises
            raise_if_memory_is_out(error)
            return first_line(error)
    if len(keys.written) != 1 or own is None or other is None:
        return "its code does not write them at once into embedded text that it hands on to a part of the model"
    target, places, result = keys.written[0]
    if own.pop(EMBEDDED) != result or other.pop(EMBEDDED) != target:
        return "its code changes the embedded text in another way too where there are sounds"
    if not are_tokens(places, ids, sounds.token):
        return "its code writes them at other places than the tokens of sounds"
    return "" if own == other else "its code gives its text model other arguments with them"
