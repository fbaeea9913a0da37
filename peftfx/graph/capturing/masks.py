"""Masks of attention that transformers makes by `torch.vmap`, which torch.export does not trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor
from transformers import masking_utils

_VMAP, _BROADCAST = "_vmap_expansion_sdpa", "_non_vmap_expansion_sdpa"
_INDEXING = "TransformGetItemToIndex"  #: lets `vmap` index by scalars; what it records is no operator

Mask = Callable[..., Tensor]


@contextmanager
def broadcast_masks() -> Iterator[None]:
    """Inside the context, transformers evaluates functions of masks at all indices by broadcasting, not by `vmap`.

    transformers' own exporters do the same. A function gets the indices of batch, head, query and key.
    """
    namespace = vars(masking_utils)
    kept = {name: namespace[name] for name in (_VMAP, _INDEXING) if name in namespace and _BROADCAST in namespace}
    namespace.update({name: way for name, way in ((_VMAP, _broadcast), (_INDEXING, nullcontext)) if name in kept})
    try:
        yield
    finally:
        namespace.update(kept)


def _broadcast(function: Mask) -> Mask:
    def expanded(*indices: Tensor) -> Tensor:
        made = function(*getattr(masking_utils, _BROADCAST)(*indices))
        return made.expand(*(index.shape[0] for index in indices))

    return expanded
