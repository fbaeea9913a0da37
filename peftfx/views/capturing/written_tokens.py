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
        Tensor.new_zeros,  # of as many tokens as a mask shows
    }
)
_COUNTS = frozenset({torch.sum, Tensor.sum})


class no_places_without_features(TorchFunctionMode):
    """A context in which the code finds no places for the features of images if there are none.

    Each mask that the code computes from a comparison with such a token has a twin, which shows no token without
    features. Where the code reads or writes embedded text, the twins stand for the masks.

    Args:
        features: the features of all pieces, by the id that stands for a piece in the text: of images, or of videos.
    """

    def __init__(self, features: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._some = {token: torch.ones_like(own[:, 0], dtype=torch.long).sum() > 0 for token, own in features.items()}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # with the masks, so that no other tensor gets their ids

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
            args, named = (*args[:1], *pytree.tree_map(self._twin, args[1:])), pytree.tree_map(self._twin, named)
        made = func(*args, **named)
        if func is Tensor.__setitem__ and id(args[0]) in self._twins:  # what is written into a mask is into its twin
            func(*pytree.tree_map(self._twin, args))
        if isinstance(made, Tensor) and (made.dtype == torch.bool or func in _COUNTS):
            twin = self._twin_of(func, args, named, made)
            if twin is not None:
                self._twins[id(made)] = made, twin
        return made

    def _twin(self, value: Any) -> Any:
        return self._twins[id(value)][1] if id(value) in self._twins else value

    def _twin_of(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], made: Tensor) -> Any:
        """Return the twin of a mask, or of how many tokens one shows; None if it does not depend on such tokens."""
        if func in _COMPARES and type(args[1]) is int:
            some = None if args[0].is_floating_point() else self._some.get(args[1])
            return None if some is None else made & some
        if all(id(leaf) not in self._twins for leaf in pytree.tree_leaves((args, named))):
            return None
        if made is args[0] and id(made) not in self._twins:  # written in place: what it was before is lost
            return made & torch.stack([*self._some.values()]).any()
        return func(*pytree.tree_map(self._twin, args), **pytree.tree_map(self._twin, named))
