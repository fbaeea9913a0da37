"""Guests: modules with adapters' parameters inside the base's modules. Also the base's own parts without guests."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from peftfx.graph.places import WRAPPED, unwrapped
from peftfx.sharding.fsdp import without_fsdp

GUESTS = "peftfx_adapters"  #: the name of the child module that holds the adapters' parameters of a base's module
OWN_CLASS = "peftfx_own_class"  #: attribute of a class made for a module with guests: the module's own class


class Guests(nn.Module):
    """The adapters' parameters of one base module. As its child, they move where the module moves.

    The base's own `state_dict` leaves them out, and its `load_state_dict` does not miss them. They are saved as
    adapters (`AdaptedModel.state_dict`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_without_guests)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Return nothing. A given `destination` is not changed."""
        given = kwargs.get("destination", args[0] if args else None)
        return given if isinstance(given, dict) else {}


def _without_guests(_: nn.Module, keys: _IncompatibleKeys) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not is_guest(key)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class, without the class that hosts guests."""
    made = next((cls for cls in type(module).__mro__ if OWN_CLASS in vars(cls)), None)
    return without_fsdp(type(module)) if made is None else vars(made)[OWN_CLASS]


def is_guest(name: str) -> bool:
    """Say whether a dotted name is that of a guest, or of a module or tensor inside a guest."""
    return GUESTS in name.split(".")


def own_modules(base: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Return the base's own modules by their paths, without guests and without torch's wrappers for checkpointing.

    A wrapper gives out the attributes of the module in it, so a path without the wrapper leads to the module, too.
    """
    named = base.named_modules(remove_duplicate=remove_duplicate)
    shown = ((path, module) for path, module in named if not is_guest(path))
    return ((unwrapped(path), module) for path, module in shown if WRAPPED not in module._modules)


def own_parameters(base: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the base's own parameters by their names, without adapters' parameters."""
    named = base.named_parameters(remove_duplicate=remove_duplicate)
    return ((unwrapped(name), p) for name, p in named if not is_guest(name))
