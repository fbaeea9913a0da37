"""Methods of a base that an adapted model has too: they run with the active adapters in the base's modules."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from peftfx.bases.guests import own_modules, own_parameters
from peftfx.errors import PeftfxError

Acts = Callable[[Mapping[str, Any]], AbstractContextManager[Mapping[str, Any]]]

#: Methods that run none of a base's modules, so that they need no adapters.
_WITHOUT_MODULES = frozenset({"prepare_decoder_input_ids_from_labels"})
#: Methods that only count parameters: the adapters' count too, wherever they are kept.
COUNTS = frozenset({"num_parameters"})
#: Methods that exchange a base's modules or tensors.
_EXCHANGES = re.compile("(_?init|load|from|resize|prune)_|set_(in|out)put_embeddings$|post_init$")
#: Methods that give out a base's modules, or that run them in other threads, where no adapter acts.
_LENDS = re.compile("__|get_(en|de)coder$|generate_batch$")


def base_method(
    base: nn.Module, name: str, method: Callable[..., object], acting: Acts | None
) -> Callable[..., object]:
    """Return a method of a base that runs with adapters in the base's modules.

    Args:
        base: the base.
        name: the method's name.
        method: the method.
        acting: makes, for the arguments of a call, a context in which the active adapters act in the base's modules,
            and which yields the arguments that are the base's; None if the adapters cannot act there.

    Raises:
        AttributeError: the method would run without the adapters, or would change what they act on.
    """
    if name in _WITHOUT_MODULES:
        return method
    if _EXCHANGES.match(name):
        raise AttributeError(f"{name}() of the base would exchange its modules: call it before you adapt the model")
    if _LENDS.match(name):
        why = "it gives out modules, or runs them in another thread; call the model, or its generate()"
        raise AttributeError(f"{name}() of the base would run without the adapters: {why}")
    if acting is None:
        raise AttributeError(f"{name}() of the base would run without the adapters")

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> object:
        before = _parts(base)
        with acting(kwargs) as own:
            result = method(*args, **own)
        if _parts(base) != before:
            what = "this method of the base exchanged modules or parameters that adapters act on"
            raise PeftfxError(what, f"{name}()", "adapt the model anew, and call the method before that")
        if any(_runs_later(value) for value in pytree.tree_leaves(result)):
            what = "what this method of the base returns would run without the adapters"
            raise PeftfxError(what, f"{name}()", "call the adapted model, or take it from get_base_model()")
        return result

    return run


def _parts(base: nn.Module) -> list[int]:
    return [id(part) for named in (own_modules(base), own_parameters(base)) for _, part in named]


def _runs_later(value: object) -> bool:
    """Return whether code runs when a result is used: a module, a function, a generator, a context."""
    return callable(value) or hasattr(value, "__next__") or hasattr(value, "__enter__")
