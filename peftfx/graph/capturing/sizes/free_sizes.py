"""Free sizes: what code computes from sizes stays free during a capture.

For `torch.tensor(x.shape[1])` torch.export reads the size, which fixes it. Here the tensor is made in the graph, as is
that of a list with sizes in it, `torch.tensor([height, width])`. What code computes from a size and from other sizes is
known as a size, too, so that code can slice by it.

For `torch.tensor([0] * batch)` Python makes a list of as many entries as the example has rows, which fixes the batch.
Inside the context such a list is not made before something reads it, and `torch.tensor` repeats the entries in the
graph. `Tensor.split` gets a plain list, as torch takes no other: how many parts there are is fixed.

`torch.div(length, window, rounding_mode="floor")` makes a tensor of two numbers, and code that uses it as a size reads
the number from the tensor. In a capture this number would be unknown, so it is computed as a size.

`math.sqrt(length)` reads its number, too; a power of one half does not.

`(window - length % window) % window` is how much a length lacks to a multiple of the window. It is written as the next
multiple minus the length, so that the sum of both is a multiple. Otherwise torch takes minutes to see that.

`x[:, :-padding]` takes padding off again. Code runs such a line only if there is some: with none, the slice would be
empty. A program without the branch counts from the start, `x[:, :length - padding]`, to be right for both.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections import UserList
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.overrides import TorchFunctionMode

from peftfx.graph.capturing.sizes.free_arguments import holds_free, is_free, row_of, stand_in
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_TENSOR = torch.tensor  #: torch's own, whatever stands for it during a capture


#: Functions of two numbers, and what they do to sizes.
_ARITHMETIC: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), operator.add),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), operator.mul),
    **dict.fromkeys((Tensor.sub, Tensor.__sub__, torch.sub), operator.sub),
    **dict.fromkeys((Tensor.__rsub__, torch.rsub), lambda own, other: other - own),
}


class _Repeated(UserList[Any]):
    """A list, repeated a free number of times. Whatever reads its entries fixes that number."""

    def __init__(self, entries: list[Any], times: SymInt) -> None:
        self.entries, self.times = entries, times

    @functools.cached_property
    def data(self) -> list[Any]:  # type: ignore[override]
        return self.entries * int(self.times)

    @property
    def __class__(self) -> type:
        return list  # for code that asks with `isinstance`

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a list keeps its class")


@contextmanager
def repeated_lists() -> Iterator[None]:
    """Keep the sizes by which lists are multiplied free in this thread. Not for two threads at once."""
    own, kept = threading.get_ident(), {name: getattr(SymInt, name) for name in ("__mul__", "__rmul__")}
    made, cut = torch.tensor, Tensor.split

    def multiplied(name: str) -> object:
        def multiply(size: SymInt, other: object) -> object:
            if type(other) is list and threading.get_ident() == own and is_free(size):
                return _Repeated(list(other), size)
            return kept[name](size, other)

        return multiply

    @functools.wraps(made)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if type(data) is not _Repeated:
            return made(data, *args, **kwargs)
        if "data" in vars(data) or kwargs.get("requires_grad"):
            return made(data.data, *args, **kwargs)
        entries = made(data.entries, *args, **kwargs)
        return entries.repeat(data.times, *[1] * (entries.ndim - 1))

    @functools.wraps(cut)
    def split(value: Tensor, sizes: Any, dim: int = 0) -> Any:
        return cut(value, sizes.data if type(sizes) is _Repeated else sizes, dim)

    for name in kept:
        setattr(SymInt, name, multiplied(name))
    torch.tensor, Tensor.split = tensor, split  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.tensor, Tensor.split = made, cut  # type: ignore[method-assign]
        for name, method in kept.items():
            setattr(SymInt, name, method)


@contextmanager
def checks_of_sizes() -> Iterator[None]:
    """Ignore checks of sizes on which torch itself fails: it bounds large sizes with floats, and these round."""
    checked = torch._check

    @functools.wraps(checked)
    def check(condition: Any, message: Any = None) -> None:
        with suppress(AssertionError):  # a condition that is false is a RuntimeError
            checked(condition, message)

    torch._check = check
    try:
        yield
    finally:
        torch._check = checked


@contextmanager
def size_arithmetic() -> Iterator[None]:
    """Compute with the sizes of this thread in this way. Not for two threads at once."""
    own, divided = threading.get_ident(), torch.div

    @functools.wraps(divided)
    def div(size: Any, by: Any, *args: Any, rounding_mode: str | None = None, **kwargs: Any) -> Any:
        sizes = isinstance(size, int | SymInt) and isinstance(by, int | SymInt)
        whole = sizes and rounding_mode is not None and not args and not kwargs
        if not whole or threading.get_ident() != own or not (size >= 0 and by > 0):  # there both ways of rounding agree
            return divided(size, by, *args, rounding_mode=rounding_mode, **kwargs)
        return size // by

    left, parts = SymInt.__mod__, dict[object, tuple[SymInt, int]]()

    def mod(size: SymInt, by: Any) -> Any:
        result = left(size, by)
        if type(by) is not int or by < 1 or threading.get_ident() != own or not isinstance(result, SymInt):
            return result
        whole, window = parts.get(by - size.node.expr, (size, 0))
        if window == by:
            return (whole + (by - 1)) // by * by - whole
        parts[result.node.expr] = size, by
        return result

    root = math.sqrt

    @functools.wraps(root)
    def sqrt(number: Any) -> Any:
        return number**0.5 if is_free(number) and threading.get_ident() == own else root(number)

    torch.div = div  # type: ignore[assignment]
    SymInt.__mod__ = mod  # type: ignore[method-assign]
    math.sqrt = sqrt
    try:
        yield
    finally:
        torch.div, SymInt.__mod__, math.sqrt = divided, left, root  # type: ignore[method-assign]


class size_tensors(TorchFunctionMode):
    """A context in which tensors of sizes stay free in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._sizes: dict[int, tuple[Tensor, Any]] = {}  # the tensors are kept, so that no other gets their ids

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is _TENSOR and args and is_free(args[0]) and self._thread == threading.get_ident():
            return self._made(args[0], **given)
        if func is _TENSOR and args and self._thread == threading.get_ident() and holds_free(args[0]):
            return row_of(args[0], **given)
        if self._thread == threading.get_ident():
            func = stand_in(func, args, given)
        if not self._sizes:
            return func(*args, **given)
        if func is Tensor.__getitem__:
            return func(args[0], self._index(args[1]))
        result = func(*args, **given)
        if func in _ARITHMETIC and len(args) == 2 and not given:
            sizes = [self._size(arg) for arg in args]
            if None not in sizes:
                self._sizes[id(result)] = result, _ARITHMETIC[func](*sizes)
        return result

    def _made(self, size: SymInt, dtype: torch.dtype | None = None, device: Any = None, **others: Any) -> Tensor:
        made = torch.scalar_tensor(size, dtype=dtype or torch.int64, device=device, **others)  # type: ignore[arg-type]
        if not made.is_floating_point():
            self._sizes[id(made)] = made, size
        return made

    def _size(self, value: object) -> Any:
        """Return the size that a value is known to be, or None."""
        if isinstance(value, Tensor):
            return self._sizes.get(id(value), (None, None))[1]
        return value if type(value) in (int, SymInt) else None

    def _index(self, index: Any) -> Any:
        """Return an index in which known sizes stand for the tensors in slices."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        if not isinstance(index, slice):
            return index
        ends = (index.start, index.stop, index.step)
        return slice(*(self._size(end) if isinstance(end, Tensor) and id(end) in self._sizes else end for end in ends))


def count_from_start(graph: fx.Graph) -> None:
    """Count the ends of slices from the start, in place, where they are free and counted from the end."""
    rewriter = Rewriter(graph)
    for node in list(graph.find_nodes(op="call_function", target=_aten.slice.Tensor)):
        end = node.args[3] if len(node.args) > 3 else None
        length = end.meta.get("val") if isinstance(end, fx.Node) else None
        if isinstance(length, SymInt) and length.node.hint is not None and length.node.hint < 0:
            at, value = rewriter.before(node), node.meta["val"]
            size = at.call(_aten.sym_size.int, *node.args[:2])
            rewriter.update(node, node.target, *node.args[:3], at.call(operator.add, size, end), *node.args[4:])
            rewriter.revalue(node, value)
