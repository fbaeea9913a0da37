"""How a model's code counts the positions of tokens, where a call gives none.

Most code counts a row's places from 0, padding included. Some counts the tokens that the mask shows, as `generate`
does, and some in a way of its own. The code is run on fake tensors, so no weight is read; whole numbers, of which
positions are made, are computed beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from peftfx.bases.example_inputs import example_inputs
from peftfx.caches.cache import empty_cache
from peftfx.errors import raise_if_memory_is_out
from peftfx.formats import FROM_MASK, FROM_ONE, OWN_WAY
from peftfx.views.decode import positions
from peftfx.views.dry_run import fake_run
from peftfx.views.view import called_with_cache

_PADDING = (0, -1, 1)  #: what code takes for the positions of padding
_ATTENTIONS = ("scaled_dot_product", "softmax")
_LARGEST = 1 << 16  #: numbers of a tensor that is computed


def left_out_positions(base: nn.Module) -> str:
    """Return how a causal model's code counts positions that a call leaves out: `FROM_ONE`, `FROM_MASK` or `OWN_WAY`.

    It is nothing if the code counts a row's places from 0, or cannot be run on fake tensors.
    """
    text = example_inputs(base, sizes={"batch": 2, "sequence": 4})
    pad = getattr(getattr(base, "config", None), "pad_token_id", None)
    with unset_fake_temporarily():
        mask = torch.ones(2, 4, dtype=torch.long)
        mask[1, :2] = 0
        tokens = text["input_ids"][:, -4:]
        tokens = tokens.masked_fill(mask == 0, pad) if isinstance(pad, int) else tokens  # some code looks for it
        given = {"input_ids": tokens, "attention_mask": mask}
        from_mask = [positions(mask).masked_fill(mask == 0, value) for value in _PADDING]
        from_zero = torch.arange(4)[None]
        tried = (("", [from_zero]), (FROM_ONE, [from_zero + 1]), (FROM_MASK, from_mask))
    seen = _read(base, given)
    if seen is None:
        return ""
    for told, ways in tried:
        if any(_equal(seen, _read(base, {**given, "position_ids": one})) for one in ways):
            return told
    return OWN_WAY


def _read(base: nn.Module, given: Mapping[str, Tensor]) -> list[Tensor] | None:
    """Return the whole numbers that floating-point operators read before the first attention: positions, tokens.

    Return None if the code does not run so.
    """
    cache = empty_cache(base)
    with fake_run(base) as fake, _WholeNumbers() as numbers:
        try:
            text = {name: numbers.known(fake(value), value) for name, value in given.items()}
            called_with_cache(base, **text, cache=cache)
        except _Attends:
            return numbers.read
        except Exception as error:  # whatever the model's code raises, for a text alone or for such positions
            raise_if_memory_is_out(error)
            return None
    return numbers.read


def _equal(one: list[Tensor], other: list[Tensor] | None) -> bool:
    return other is not None and len(one) == len(other) and all(map(_same, one, other))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers; one row may stand for all."""
    try:
        return torch.equal(*torch.broadcast_tensors(one, other))
    except RuntimeError:
        return False


class _Attends(Exception):
    """Ends a run at its first attention, before which all positions are read."""


class _WholeNumbers(TorchDispatchMode):
    """Computes whole numbers, beside fake tensors, from those that are known.

    Attributes:
        read: those that operators with floating-point results read, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []
        self._known = WeakIdKeyDictionary()

    def known(self, fake: Tensor, value: Tensor) -> Tensor:
        """Return a fake tensor whose numbers are `value`."""
        with unset_fake_temporarily():
            self._known[fake] = value.clone()
        return fake

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in _ATTENTIONS):
            raise _Attends
        made = func(*args, **(kwargs or {}))
        given, results = _tensors((args, kwargs)), _tensors(made)
        whole = [t for t in given if not t.is_floating_point() and not t.is_complex()]
        values = {id(t): self._value(t) for t in whole}
        if any(t.is_floating_point() for t in results):
            found = (values[id(t)] for t in whole if t.dtype != torch.bool and t.ndim)
            with unset_fake_temporarily():
                self.read += [value.clone() for value in found if value is not None]
        elif len(whole) == len(given) and all(v is not None for v in values.values()):
            self._compute(func, args, kwargs or {}, results, values)
        else:
            for tensor in results:
                self._known.pop(tensor, None)
        return made

    def _value(self, tensor: Tensor) -> Tensor | None:
        return self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _compute(
        self, func: Any, args: Any, kwargs: Any, results: list[Tensor], values: Mapping[int, Tensor | None]
    ) -> None:
        """Compute an operator of whole numbers, unless its results are large."""
        if any(t.numel() > _LARGEST for t in results):
            return
        with unset_fake_temporarily():
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: values[id(t)], (args, kwargs))
            for tensor, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                self._known[tensor] = value


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
