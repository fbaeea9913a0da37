"""Known values: small tensors of a call whose values are constants of a graph, such as the grid of an image's patches.

A model's code may read such values to choose sizes, and loop over them. Inside `known_values`, whatever is computed
from known tensors alone is computed at once, outside fake tensors and captures, so that its numbers can be read.

Some code also compares pixels with a number, to drop tiles that are empty. The answer for a picture without empty tiles
is known too. `agreed` says in the graph whether a call's own answers are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.errors import PeftfxError

_FACTORIES = frozenset({torch.arange, torch.linspace, torch.tensor})
_FILLED = frozenset({torch.zeros, torch.ones, torch.full, torch.empty})
_NUMBERS = (int, float, bool, str, torch.dtype, torch.device, type(None))
#: Functions whose result has the values of their first argument, in another place, shape or dtype.
_MOVES = frozenset(
    {
        *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.float),
        *(Tensor.unsqueeze, Tensor.squeeze, torch.flatten, torch.reshape),
    }
)
_COMPARES = frozenset({Tensor.eq, Tensor.ne, Tensor.__eq__, Tensor.__ne__, torch.eq, torch.ne})


class known_values(TorchFunctionMode):
    """A context in which these tensors are known, and so is what the code computes from them alone.

    Args:
        tensors: plain tensors, which are not fake and are no inputs of a capture.
        pixels: tensors whose comparisons with a number are answered as for ones.

    Raises:
        PeftfxError: the code writes a value that is not known into a known tensor.
    """

    def __init__(self, tensors: Iterable[Tensor], pixels: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {id(tensor): tensor for tensor in tensors}  # kept, so that no other tensor gets their ids
        with _disable_current_modes():
            self._pixels = {id(t): (t, torch.ones(t.shape, dtype=t.dtype)) for t in pixels if _plain(t)}
        self._answers: list[tuple[Tensor, Tensor]] = []

    def agreed(self) -> Tensor | None:
        """Return whether the call's own comparisons of pixels gave the known answers, bool[]; None without any."""
        found = [(answer == known).all() for answer, known in self._answers]
        return torch.stack(found).all() if found else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute at once what is known, and leave all else to what is around this context."""
        named = dict(kwargs or {})
        leaves = pytree.tree_leaves((args, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = [id(tensor) in self._known for tensor in tensors]
        if all(known) if tensors else _makes_numbers(func, leaves, named):
            return self._at_once(func, args, named)
        if any(known) and _writes(func, named) and id(tensors[0]) in self._known:
            what = "the model's code writes a computed value into a tensor that holds the sizes of images"
            raise PeftfxError(what, getattr(func, "__name__", str(func)), "export its text alone")
        if func is Tensor.__getitem__:
            args = (args[0], self._by_numbers(args[1]))
        if any(known):
            named = pytree.tree_map(self._number, named)
            args = (*args[:1], *pytree.tree_map(self._number, args[1:]))
        made = func(*args, **named)
        pixels = self._pixels.get(id(tensors[0])) if len(tensors) == 1 else None
        return made if pixels is None else self._of_pixels(func, pixels[1], args, named, made)

    def _at_once(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            made = func(*args, **named)
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._known[id(leaf)] = leaf
        return made

    def _of_pixels(
        self, func: Callable[..., Any], pixels: Tensor, args: tuple[Any, ...], named: dict[str, Any], made: Any
    ) -> Any:
        if func in _MOVES:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self._pixels[id(made)] = made, func(pixels, *args[1:], **named)
        if func not in _COMPARES:
            return made
        known = self._at_once(func, (pixels, *args[1:]), named)
        self._answers.append((made, known))
        return known

    def _number(self, value: Any) -> Any:
        """Return a known whole number as one of Python, which can be a size."""
        whole = isinstance(value, Tensor) and id(value) in self._known and not value.ndim
        if not whole or value.dtype not in (torch.int64, torch.int32):
            return value
        with _disable_current_modes():
            return value.item()

    def _by_numbers(self, index: Any) -> Any:
        """Return an index in which known masks are the numbers of their places, and known bounds numbers of Python: so
        the size of the result is known.
        """
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and id(part) in self._known and part.dtype == torch.bool:
                parts += self._at_once(torch.Tensor.nonzero, (part,), {}).unbind(-1)
            elif isinstance(part, slice):
                parts.append(slice(*map(self._number, (part.start, part.stop, part.step))))
            else:
                parts.append(part)
        return tuple(parts)


def _plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and all(isinstance(size, int) for size in tensor.shape)


def _makes_numbers(func: object, leaves: list[Any], named: Mapping[str, Any]) -> bool:
    """Return whether a call without tensors makes one from plain numbers, which the code may then read."""
    if func not in _FACTORIES and not (func in _FILLED and _whole(func, leaves, named)):
        return False
    return all(isinstance(leaf, _NUMBERS) for leaf in leaves)  # a size that is a symbol is none


def _whole(func: object, leaves: list[Any], named: Mapping[str, Any]) -> bool:
    """Return whether a filled tensor has whole numbers. Others are often written into, piece by piece."""
    dtype = named.get("dtype")
    if dtype is None:
        fill = named.get("fill_value", leaves[-1] if leaves else None)
        return func is torch.full and type(fill) in (int, bool)
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def _writes(func: object, named: Mapping[str, Any]) -> bool:
    """Return whether a function writes into its first argument."""
    name = str(getattr(func, "__name__", ""))
    inside = name.startswith("__i") and name not in ("__int__", "__index__", "__invert__", "__iter__")
    return "out" in named or name == "__setitem__" or inside or (name.endswith("_") and not name.endswith("__"))
