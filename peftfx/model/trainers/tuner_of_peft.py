"""The class `TunerOfPeft`: the base's inner model, with the methods that HF PEFT's users call on `base_model`."""

from __future__ import annotations

from typing import SupportsIndex

from torch import nn

_OF_ADAPTED = frozenset(
    {
        *("active_adapters", "add_weighted_adapter", "delete_adapter", "merge_adapter", "merge_and_unload"),
        *("peft_config", "set_adapter", "set_requires_grad", "unload", "unmerge_adapter"),
    }
)
"""Names of HF PEFT's tuner that are the adapted model's own. Some are transformers' too, and mean its own adapters."""

_ALLOCATE = "update_and_allocate"

_INSTEAD = {
    "disable_adapter_layers": "`with model.disable_adapter():`, or model.set_adapter([])",
    "enable_adapter_layers": "model.set_adapter([...]) after model.set_adapter([])",
}


def refuse_layers_of_peft(name: str) -> None:
    """Refuse a name by which HF PEFT switches its layers on and off, and say what does so here.

    Raises:
        AttributeError: it is such a name.
    """
    if name in _INSTEAD:
        raise AttributeError(f"an adapted model has no {name}(): use {_INSTEAD[name]}")


class TunerOfPeft:
    """The inner model of a base, with the adapted model's methods that HF PEFT has on `base_model`.

    In HF PEFT, `base_model` is the tuner. Code for it calls the tuner's `set_adapter`, say; and training loops and
    callbacks call its `update_and_allocate`, and leave it out without a word if there is none. All else is the inner
    model's own, but for `model`: if the inner model has no such module, it is the whole base, as in HF PEFT.

    Args:
        inner: the base's own `base_model`, or the base if it has none.
        adapted: the adapted model.
        allocates: whether `update_and_allocate` changes an adapter, as of AdaLoRA.
    """

    def __init__(self, inner: nn.Module, adapted: nn.Module, *, allocates: bool) -> None:
        self.__dict__.update(_inner=inner, _adapted=adapted, _names=_OF_ADAPTED | ({_ALLOCATE} if allocates else set()))

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_inner"])

    def __getattr__(self, name: str) -> object:
        refuse_layers_of_peft(name)
        if name == "active_adapter":
            return self.__dict__["_adapted"].active_adapters  # HF PEFT's tuner has a list there
        if name == "model" and not hasattr(self.__dict__["_inner"], name):
            return self.__dict__["_adapted"].get_base_model()
        return getattr(self.__dict__["_adapted" if name in self.__dict__["_names"] else "_inner"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_inner"], name, value)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.__dict__["_inner"](*args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Copy and save the inner model alone."""
        return self.__dict__["_inner"].__reduce_ex__(protocol)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return repr(self.__dict__["_inner"])
