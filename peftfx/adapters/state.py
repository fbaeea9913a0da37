"""A saved state, held against the adapters that it is loaded into before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.errors import PeftfxError
from peftfx.graph.graph import ADAPTERS


def refuse_other_state(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], adapters: Mapping[str, Adapter], strict: bool
) -> None:
    """Refuse a state that is not of these adapters.

    Args:
        own: all that the model holds, by name.
        given: the state.
        adapters: by name; what their training remembers may be there or not, and be of any size.
        strict: whether every tensor of an adapter must be there, and nothing else.

    Raises:
        PeftfxError: what is missing, unexpected, of another shape or no tensor.
    """
    placed = ((f"{ADAPTERS}.{name}.{p.key}", p) for name, adapter in adapters.items() for p in adapter.placements)
    remembered = {f"{start}.{name}" for start, p in placed for name in p.method.remembered()}
    fixed = own.keys() - remembered
    other = [n for n in sorted(given.keys() & fixed) if _shape(given[n]) != tuple(own[n].shape)]
    found = {"of another shape": [f"{n}: {_shape(given[n])}, not {tuple(own[n].shape)}" for n in other]}
    if strict:
        found["missing"] = sorted(n for n in fixed - given.keys() if n.startswith(f"{ADAPTERS}."))
        found["unexpected"] = sorted(map(str, given.keys() - fixed - remembered))
    lines = [f"{what}: {_listed(names)}" for what, names in found.items() if names]
    if lines:
        hint = "make the adapters as they were when it was saved"
        raise PeftfxError("this state is not of these adapters:\n  " + "\n  ".join(lines), "", hint)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else "no tensor"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
