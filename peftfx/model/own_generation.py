"""Calls of `generate` that the base's own modules run: adapters' names for rows, and how many rows there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError
from peftfx.views.row_adapters import NAMES


def refuse_names(kwargs: Mapping[str, Any]) -> None:
    """Refuse adapters' names for rows in a call that a graph runs.

    Raises:
        PeftfxError: the call gives such names.
    """
    if kwargs.get(NAMES) is not None:
        what = "rows choose among adapters only where the base's own modules run all of them"
        raise PeftfxError(what, NAMES, "generate for the rows of each adapter by themselves, or export(batched=...)")


def refuse_other_count(names: Sequence[str], given: object) -> None:
    """Refuse adapters' names of which there are more or fewer than rows in any tensor of a call.

    Raises:
        PeftfxError: the call's arguments, `given`, have tensors, and none of them has a row for each name.
    """
    tensors = [value for value in pytree.tree_leaves(given) if isinstance(value, Tensor) and value.ndim]
    if tensors and all(len(value) != len(names) for value in tensors):
        what = f"{len(names)} names are given, and the call has {len(tensors[0])} rows"
        raise PeftfxError(what, NAMES, "give one adapter's name for each row")


def rows_of_each(base: nn.Module, kwargs: Mapping[str, Any], asked: str) -> int:
    """Return for how many rows each row of a prompt stands in a call of `generate`: beams, or several texts.

    Raises:
        PeftfxError: it is more than one, and the base encodes a source, which has each row once.
    """
    own = getattr(base, "generation_config", None)
    counts = (_asked(kwargs, n, getattr(own, n, None)) for n in ("num_beams", "num_return_sequences"))
    most = max(1, *(count or 1 for count in counts))
    if most > 1 and encodes_and_decodes(base):
        what = f"{asked} has a value for each row of the source, and the text has more rows"
        raise PeftfxError(what, asked, "generate with num_beams=1 and num_return_sequences=1, or for each value alone")
    return most


def _asked(kwargs: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an option of a call of `generate`, which may be in its `generation_config`."""
    found = kwargs.get(name)
    found = getattr(kwargs.get("generation_config"), name, None) if found is None else found
    return default if found is None else found
