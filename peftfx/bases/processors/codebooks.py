"""Codes of several codebooks at each place of a sequence: how a model takes them, found by runs on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.fake_runs import on_fakes
from peftfx.errors import PeftfxError

_found: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
_BATCH, _LENGTH = 2, 3  #: sizes of a trial


def codes_shape(
    model: nn.Module, config: object, name: str, shape: tuple[int, int], beside: Mapping[str, Tensor]
) -> tuple[int, ...]:
    """Return the shape in which a model takes the codes of a call: [batch, length], with an axis for codebooks behind
    it, or with a row for each codebook.

    Args:
        model: the model; its weights are not read.
        config: the config of the part that reads the codes.
        name: the argument that takes them.
        shape: batch and length.
        beside: other arguments that the forward needs, with a first axis for the batch.
    """
    books = first_of(config, "num_codebooks", "num_channels")
    if not isinstance(books, int) or isinstance(getattr(config, "image_size", None), int):
        return shape
    known = _found.setdefault(model, {})
    if name not in known:
        forms = range(len(_forms(shape, books)))
        known[name] = next((form for form in forms if _runs(model, name, form, books, beside)), 0)
    return _forms(shape, books)[known[name]]


def refuse_codes(model: nn.Module, ids: Tensor, batch: int) -> None:
    """Refuse a model whose example has codes of several codebooks: it could not be run token by token.

    Raises:
        PeftfxError: the tokens are not [batch, length].
    """
    if ids.ndim != 2 or ids.shape[0] != batch:
        what = "the model reads codes of several codebooks at each place, and a decode view one token"
        raise PeftfxError(what, type(model).__name__, "use the forward view")


def _forms(shape: tuple[int, int], books: int) -> list[tuple[int, ...]]:
    batch, length = shape
    return [shape, (*shape, books), (*shape, books + 1), (batch * books, length)]  # a text may be beside the codes


def _runs(model: nn.Module, name: str, form: int, books: int, beside: Mapping[str, Tensor]) -> bool:
    """Return whether a model's forward takes codes in a form."""
    with on_fakes(model) as mode:
        others = {n: mode.from_tensor(torch.cat([value, value])[:_BATCH]) for n, value in beside.items()}
        try:
            model(**others, **{name: torch.zeros(_forms((_BATCH, _LENGTH), books)[form], dtype=torch.long)})
        except Exception:  # whatever the model's code raises
            return False
    return True
