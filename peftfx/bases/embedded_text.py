"""The text of a call, where its embedding is replaced: by the embedding's class, or by hooks for one call.

In a compiled call no hook can be added. So a module that hosts virtual tokens has a class whose `__call__` asks for the
text (`call_asking`); other modules get hooks. Both act around all hooks of others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
ASKS = "peftfx_asks"  #: attribute of a class whose `__call__` asks for the text


@dataclass(eq=False)
class EmbeddedText:
    """The text of one call, where the base embeds it.

    Attributes:
        path: the path of the module that embeds it.
        ids: the text in the call's arguments; None if it is not there.
        replaced: returns what replaces the embedded text.
        left_out: how many ids of each row, the first ones, the embedding does not get; it may be a symbol.
        first: the ids that the embedding got first, which are the text.
    """

    path: str
    ids: Tensor | None
    replaced: Callable[[Tensor], Tensor]
    left_out: int
    first: Tensor | None = None

    @contextmanager
    def within(self, base: nn.Module) -> Iterator[None]:
        """Replace the embedded text, in calls of the base by this thread, until the `with` block ends.

        Raises:
            PeftfxError: the base has not called the module that embeds its text.
        """
        embedding = base.get_submodule(self.path)
        with _asked(embedding, self) if hasattr(type(embedding), ASKS) else _hooked(embedding, self):
            yield
        if self.first is None:
            what = "the model's code does not call the module that embeds its text"
            raise PeftfxError(what, self.path, "use a method that acts on weights")

    def shortened(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Return what the embedding gets in place of these arguments; None if they are not the text."""
        ids = _ids_in(args, kwargs)
        if ids is None or not (self.first is None or _same(ids, self.first)):
            return None
        self.first = ids if self.first is None else self.first
        if isinstance(self.left_out, int) and self.left_out == 0:
            return args, kwargs
        if self.ids is not None and _turned(ids, self.ids):
            what = "the model's code transposes its text before it embeds it, so virtual tokens have no place there"
            raise PeftfxError(what, self.path, "use a method that acts on weights")
        return pytree.tree_map_only(Tensor, lambda ids: ids[:, self.left_out :], (args, kwargs))


class _Current(threading.local):
    """The text of this thread's present call, and the module that embeds it."""

    def __init__(self) -> None:
        self.embedding: nn.Module | None = None
        self.text: EmbeddedText | None = None


_CURRENT = _Current()


def call_asking(own: type[nn.Module]) -> Callable[..., object]:
    """Return a `__call__` that asks for the text, for a class that derives from `own`."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        text = _CURRENT.text if _CURRENT.embedding is self else None
        given = None if text is None else text.shortened(args, kwargs)
        if text is None or given is None:
            return own.__call__(self, *args, **kwargs)
        embedded = text.replaced(own.__call__(self, *given[0], **given[1]))
        ids, first = _ids_in(args, kwargs), text.first
        if ids is first or not torch.compiler.is_dynamo_compiling():
            return embedded
        same = torch.eq(ids, first).all()  # type: ignore[arg-type]
        return torch.where(same, embedded, own.__call__(self, *args, **kwargs))  # `_same` knows the axes alone

    return call


@contextmanager
def _asked(embedding: nn.Module, text: EmbeddedText) -> Iterator[None]:
    before = _CURRENT.embedding, _CURRENT.text
    _CURRENT.embedding, _CURRENT.text = embedding, text
    try:
        yield
    finally:
        _CURRENT.embedding, _CURRENT.text = before


@contextmanager
def _hooked(embedding: nn.Module, text: EmbeddedText) -> Iterator[None]:
    thread, acts = threading.get_ident(), False

    def shorten(module: nn.Module, args: Args, kwargs: Kwargs | None = None) -> tuple[Args, Kwargs] | None:
        nonlocal acts
        if threading.get_ident() != thread:
            return None  # another call of the base: without kwargs, if this hook was removed during it
        given = text.shortened(args, kwargs or {})
        acts = given is not None
        return given

    def replace(module: nn.Module, args: Args, embedded: Tensor) -> Tensor | None:
        return text.replaced(embedded) if acts and threading.get_ident() == thread else None

    first = embedding.register_forward_pre_hook(shorten, with_kwargs=True, prepend=True)
    with first, embedding.register_forward_hook(replace):
        yield


def _ids_in(args: Args, kwargs: Kwargs) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _same(ids: Tensor, first: Tensor) -> bool:
    """Return whether ids are those of an earlier call; of ids without values, whether they have the same axes."""
    if ids.ndim != first.ndim or not all(map(_equal, ids.shape, first.shape)):
        return False
    return isinstance(ids, FakeTensor) or torch.compiler.is_compiling() or torch.equal(ids, first)


def _equal(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    return statically_known_true(size == other)  # without a guard


def _turned(ids: Tensor, text: Tensor) -> bool:
    """Return whether ids are not those of a text row by row, but [sequence, batch]."""
    if ids.shape[:1] != text.shape[:1]:
        return True
    known = not isinstance(ids, FakeTensor) and not torch.compiler.is_compiling()
    return known and ids.shape == text.T.shape and torch.equal(ids, text.T) and not torch.equal(ids, text)
