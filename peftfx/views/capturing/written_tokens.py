"""Image tokens that a model writes itself. In a step without images they are text, as for transformers' `generate`.

A class then gets no images, and its code puts none into the text. A graph always gets features, of length 0 in such a
step. So where it writes into embedded text, or reads from it, at the tokens of images, it does so only if there are
features. In each step it chooses the token that some models embed in place of an image's, as such a class does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_COMPARES = frozenset({torch.eq, Tensor.eq, Tensor.__eq__})
#: Functions of a tensor and the places in it that are read or written, but not a choice between two tensors.
_AT_PLACES = frozenset(
    {
        *(Tensor.__getitem__, Tensor.__setitem__, torch.masked_select, Tensor.masked_select),
        *(torch.index_put, Tensor.index_put, Tensor.index_put_),
        *(torch.masked_scatter, Tensor.masked_scatter, Tensor.masked_scatter_),
        *(torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_),
    }
)


class no_places_without_features(TorchFunctionMode):
    """A context in which the code finds no places for the features of images if there are none.

    Args:
        token: the id that stands for a piece of an image.
        features: the features of all pieces.
    """

    def __init__(self, token: int, features: Tensor) -> None:
        super().__init__()
        self._token = token
        self._some = torch.ones_like(features[:, 0], dtype=torch.long).sum() > 0
        self._places: dict[int, Tensor] = {}  # kept, so that no other tensor gets their ids

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Ask for features too where the code reads or writes at the tokens of images."""
        named = dict(kwargs or {})
        if func in _AT_PLACES and args[0].is_floating_point():  # token ids are changed without images too
            args, named = (*args[:1], *pytree.tree_map(self._if_some, args[1:])), pytree.tree_map(self._if_some, named)
        made = func(*args, **named)
        if isinstance(made, Tensor) and made.dtype == torch.bool and self._tells_places(func, args):
            self._places[id(made)] = made
        return made

    def _if_some(self, value: Any) -> Any:
        return value & self._some if id(value) in self._places else value

    def _tells_places(self, func: object, args: tuple[Any, ...]) -> bool:
        if func in _COMPARES and type(args[1]) is int:
            return bool(args[1] == self._token) and not args[0].is_floating_point()
        return any(id(leaf) in self._places for leaf in pytree.tree_leaves(args))
