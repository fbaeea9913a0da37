"""The check of a saved state against the adapters that it is loaded into, before a tensor is copied."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.errors import PeftfxError, listed, warn
from peftfx.graph.graph import ADAPTERS

_MOST = 5  #: the most names that a message lists
_OTHER = "a state of HF PEFT is loaded by peftfx.set_peft_model_state_dict(model, state)"


def refuse_other_state(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], adapters: Mapping[str, Adapter], strict: bool
) -> None:
    """Refuse a state whose tensors are not those of these adapters. Warn of what is left out, if that is allowed.

    Args:
        own: all tensors of the model, by name.
        given: the state.
        adapters: the adapters by name. Buffers that their methods keep during training may be missing, or of any size.
        strict: whether the state must have every tensor of the adapters, and no other tensor.

    Raises:
        PeftfxError: the state has missing or unexpected names, tensors of another shape, or values that are no tensors.
    """
    placed = ((f"{ADAPTERS}.{name}.{p.key}", p) for name, adapter in adapters.items() for p in adapter.placements)
    remembered = {f"{start}.{name}" for start, p in placed for name in p.method.remembered()}
    fixed = own.keys() - remembered
    other = [n for n in sorted(given.keys() & fixed) if _shape(given[n]) != tuple(own[n].shape)]
    found = {"of another shape": [f"{n}: {_shape(given[n])}, not {tuple(own[n].shape)}" for n in other]}
    if strict:
        found["missing"] = sorted(n for n in fixed - given.keys() if n.startswith(f"{ADAPTERS}."))
        found["unexpected"] = sorted(map(str, given.keys() - fixed - remembered))
    lines = [f"{what}: {listed(names, _MOST)}" for what, names in found.items() if names]
    foreign = bool(given) and not any(str(n).startswith(f"{ADAPTERS}.") for n in given)
    if foreign and not lines and not given.keys() & own.keys():
        first = listed(sorted(map(str, given)), 1)
        warn(f"nothing is loaded: the state has no tensor of these adapters, but {first}; {_OTHER}")
    ours = {str(n).split(".")[1] for n in given if str(n).startswith(f"{ADAPTERS}.")}
    if (gone := ours - adapters.keys()) and not lines:
        has = f"the adapters {listed(sorted(adapters), _MOST)}" if adapters else "no adapter"
        lost = listed(sorted(gone), _MOST)
        warn(f"tensors of {lost} are not loaded: the model has {has}. Give the adapter the name that it had")
    if lines:
        hint = _OTHER if foreign else "make the adapters as they were when it was saved"
        raise PeftfxError("this state is not of these adapters:\n  " + "\n  ".join(lines), "", hint)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else "no tensor"
