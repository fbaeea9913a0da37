"""Gradient checkpointing: the backward computes a layer again with the same adapters as the forward did.

In the backward a layer runs outside of the adapted model's call, and perhaps in another thread. So the function that
checkpoints the base's layers remembers the adapters that act when a layer first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT, Keys, acting

#: The attributes in which transformers' layers, and torch's checkpoint wrapper, keep the checkpointing function.
_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Bound:
    """A checkpointing function that computes each layer again with the adapters that act now."""

    def __init__(self, checkpoint: Callable[..., object]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        return self.checkpoint(functools.partial(_run, CURRENT.keys or (), CURRENT.given, function), *args, **kwargs)


def _run(keys: Keys, given: Mapping[str, Tensor], function: Callable[..., object], *args: Any, **kwargs: Any) -> object:
    with acting(keys, given):
        return function(*args, **kwargs)


def recomputed(acted: Collection[Keys | None]) -> Keys | None:
    """Return the adapters with which a layer is computed again outside of a call, in a backward; None elsewhere.

    The model's own code may checkpoint a part of itself, `checkpoint(self.block, x)`. The backward then runs the
    layer as its one forward did.

    Args:
        acted: the adapters of each call that has run the layer; None for a call with inputs or rows of its own.

    Raises:
        PeftfxError: several adapters have acted, so those of the forward are not known.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return None
    found = next(iter(acted), None)
    if len(acted) != 1 or found is None:
        what = "a layer is computed again in the backward by a checkpoint that peftfx does not know of"
        hint = "call gradient_checkpointing_enable() of the adapted model, or wrap the layers ahead of peftfx.transform"
        raise PeftfxError(what, "gradient checkpointing", hint)
    return found


def bind_checkpoints(base: nn.Module) -> None:
    """Bind the functions that checkpoint the base's layers to the adapters that act."""
    for _, module in own_modules(base):
        for name in _FUNCTIONS:
            function = vars(module).get(name)
            if callable(function) and not isinstance(function, _Bound):
                setattr(module, name, _Bound(function))


def checkpoint_base(base: nn.Module, given: Mapping[str, object] | None, options: Mapping[str, object]) -> None:
    """Enable gradient checkpointing by the base's own code.

    Raises:
        PeftfxError: the base's code cannot checkpoint layers.
    """
    enable = getattr(base, "activation_checkpointing_enable", None)
    if enable is None:
        what = "this model has no gradient checkpointing of its own"
        hint = "wrap its layers in torch.distributed.algorithms._checkpoint.checkpoint_wrapper before you adapt it"
        raise PeftfxError(what, type(base).__name__, hint)
    try:
        enable(None if given is None else dict(given), **options)
    except ValueError as error:
        raise PeftfxError(str(error), type(base).__name__, "train with a smaller batch") from error
    bind_checkpoints(base)


def is_checkpointed(base: nn.Module) -> bool:
    """Return whether the base's own code checkpoints a layer."""
    return any(getattr(module, "gradient_checkpointing", False) for _, module in own_modules(base))


def stop_checkpointing(base: nn.Module) -> None:
    """Disable gradient checkpointing in the base."""
    disable = getattr(base, "activation_checkpointing_disable", None)
    if disable is not None:
        disable()
        base.disable_input_require_grads()  # type: ignore[operator]
