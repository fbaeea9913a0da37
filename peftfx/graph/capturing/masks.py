"""Masks of attention that transformers makes by `torch.vmap`, which torch.export does not trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor
from transformers import masking_utils

_VMAP, _BROADCAST = "_vmap_expansion_sdpa", "_non_vmap_expansion_sdpa"
_INDEXING = "TransformGetItemToIndex"  #: lets `vmap` index by scalars; what it records is no operator
_UNNEEDED = "_ignore_bidirectional_mask_sdpa"  #: tells whether attention over both sides goes without a mask

Mask = Callable[..., Tensor]


@contextmanager
def broadcast_masks() -> Iterator[None]:
    """Inside the context, transformers evaluates functions of masks at all indices by broadcasting, not by `vmap`.

    transformers' own exporters do the same. A function gets the indices of batch, head, query and key. Attention over
    both sides that has no mask in a call of the model has none in a capture.
    """
    namespace = vars(masking_utils)
    kept = {name: namespace[name] for name in (_VMAP, _INDEXING) if name in namespace and _BROADCAST in namespace}
    namespace.update({name: way for name, way in ((_VMAP, _broadcast), (_INDEXING, nullcontext)) if name in kept})
    if _UNNEEDED in namespace:
        kept[_UNNEEDED] = namespace[_UNNEEDED]
        namespace[_UNNEEDED] = _unneeded(namespace[_UNNEEDED])
    try:
        yield
    finally:
        namespace.update(kept)


def _broadcast(function: Mask) -> Mask:
    def expanded(*indices: Tensor) -> Tensor:
        made = function(*getattr(masking_utils, _BROADCAST)(*indices))
        return made.expand(*(index.shape[0] for index in indices))

    return expanded


def _unneeded(decide: Callable[..., bool]) -> Callable[..., bool]:
    """Return transformers' decision whether a mask is unneeded, but without a padding mask it always is.

    In captures transformers always makes a mask, because the values of a padding mask cannot be read there. A mask that
    hides nothing is more than a cost: Informer's cross attention has it made for the wrong number of keys.
    """

    def unneeded(padding_mask: Tensor | None, kv_length: int, local_attention_size: int | None = None) -> bool:
        if padding_mask is None and local_attention_size is None:
            return True
        return decide(padding_mask, kv_length, local_attention_size)

    return unneeded
