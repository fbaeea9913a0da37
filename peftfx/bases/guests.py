"""Guests: adapters' parameters beside the base's own, in the modules that they act in; and the base without them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from peftfx.sharding import without_fsdp

GUESTS = "peftfx_adapters"  #: the child of a base's module that holds what acts there
OWN_CLASS = (
    "peftfx_own_class"  #: of a class that was made for a module that hosts guests: the one that it stands beside
)


class Guests(nn.Module):
    """What acts in one module of a base: a child of that module, so that its parameters go where the module goes.

    The base's own `state_dict` is without them, and its `load_state_dict` misses none of them: they are saved as the
    adapters' (`AdaptedModel.state_dict`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_without_guests)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Nothing: what is given as `destination` stays as it is."""
        given = kwargs.get("destination", args[0] if args else None)
        return given if isinstance(given, dict) else {}


def _without_guests(_: nn.Module, keys: _IncompatibleKeys) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not is_guest(key)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's own class, whatever it hosts."""
    made = next((cls for cls in type(module).__mro__ if OWN_CLASS in vars(cls)), None)
    return without_fsdp(type(module)) if made is None else vars(made)[OWN_CLASS]  # type: ignore[no-any-return]


def is_guest(name: str) -> bool:
    """Whether a dotted name is that of a guest, or of a module or a tensor in one."""
    return GUESTS in name.split(".")


def own_modules(base: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The base's modules by their paths, without what adapters put beside them."""
    named = base.named_modules(remove_duplicate=remove_duplicate)
    return ((path, module) for path, module in named if not is_guest(path))


def own_parameters(base: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by their names, without the adapters'."""
    named = base.named_parameters(remove_duplicate=remove_duplicate)
    return ((name, p) for name, p in named if not is_guest(name))
