"""Finds whether a forward that encodes sounds itself computes the same from embedded text with the sounds in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfx.bases.processors.sounds.in_forward import SCATTERS
from peftfx.errors import first_line, raise_if_memory_is_out
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.handed.arguments import are_tokens, handed_arguments
from peftfx.views.sounds.encoded import EMBEDDED, Sounds

_TEXT, _MASK = "input_ids", "attention_mask"


class _Text(TorchFunctionMode):
    """What a forward writes into embedded text.

    Attributes:
        written: each target, its places, and the result, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in SCATTERS and args[0].is_floating_point():
            self.written.append((args[0], args[1], made))
        return made


def why_not_embedded(base: nn.Module, made: Mapping[str, Tensor], sounds: Sounds) -> str:
    """Return why embedded text with the features of sounds in it cannot be given to a forward, or nothing if it can.

    The forward has to write the features, in order, into the text that the model embeds, at the tokens of sounds, and
    to hand the result on. Given embedded text, it has to hand that on, with the same other arguments.

    Args:
        base: the model; it is run on fake tensors.
        made: an example: a text, and recordings with their masks.
        sounds: how the model reads sounds.
    """
    ids, heard = made[_TEXT], {name: made[name] for name in sounds.names if name in made}
    with fake_run(base) as fake:
        mask, given = fake(made[_MASK]), {name: fake(value) for name, value in heard.items()}
        try:
            with known_values([ids]), _Text() as text, _embedded_by(base) as embedded:
                own = handed_arguments(base, {_TEXT: ids, _MASK: mask, **given})
            if len(text.written) != 1 or own is None:
                return "its code does not write them into the embedded text at once"
            target, places, result = text.written[0]
            if not any(target is found for found in embedded) or own.pop(EMBEDDED) is not result:
                return "its code changes the embedded text before or after it writes them"
            if not are_tokens(places, ids, sounds.token):
                return "its code writes them at other places than the tokens of sounds"
            alone = torch.zeros_like(result)
            other = handed_arguments(base, {EMBEDDED: alone, _MASK: mask})
        except Exception as error:  # whatever the model's code raises
            raise_if_memory_is_out(error)
            return first_line(error)
        if other is None or other.pop(EMBEDDED) is not alone:
            return "its code changes embedded text"
        same = own.keys() == other.keys() and all(own[n] is other[n] or _plain_same(own[n], other[n]) for n in own)
        return "" if same else "its code gives its text model other arguments with them"


def _plain_same(one: object, other: object) -> bool:
    return not isinstance(one, Tensor) and type(one) is type(other) and one == other


@contextmanager
def _embedded_by(base: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list of what the model's embedding of tokens returns inside the context."""
    found: list[Tensor] = []
    hook: Callable[..., None] = lambda module, args, output: found.append(output)  # noqa: E731
    with base.get_input_embeddings().register_forward_hook(hook):  # type: ignore[operator]
        yield found
