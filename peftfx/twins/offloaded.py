"""Offloaded weights, which accelerate's hooks keep on disk or in host memory, fetched when their values are read.

https://github.com/huggingface/accelerate/blob/main/src/accelerate/hooks.py (AlignDevicesHook)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.graph.lazy_weights import Stored

HOOK, OWN_FORWARD = "_hf_hook", "_old_forward"
_View = Callable[[Tensor], Tensor]


class Fetched(Stored):
    """A tensor that stands for a weight that is elsewhere. Each operator that needs its values fetches and frees them.

    Attributes:
        of: the mapping that holds the weight, and the weight's name in it.
        views: the views, applied in turn, that lead from the weight to this tensor.
        like: a tensor with this tensor's shape and strides, without values.
    """

    of: tuple[Mapping[str, Tensor], str]
    views: tuple[_View, ...]
    like: Tensor

    @staticmethod
    def __new__(
        cls,
        of: tuple[Mapping[str, Tensor], str],
        like: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        views: tuple[_View, ...] = (),
    ) -> Fetched:
        made: Fetched = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=dtype, device=device
        )
        made.of, made.like, made.views = of, like, views
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Fetched({list(self.shape)}, {self.of[1]} as {self.dtype})"

    @property
    def source(self) -> Tensor:  # type: ignore[override]
        """The values, fetched at each access; under fake tensors a fake tensor, for which nothing is fetched."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        values = self.of[0][self.of[1]].to(self.device)
        for view in self.views:
            values = view(values)
        return values

    def moved(self, view: _View) -> Fetched:
        """Return a view of this tensor, without fetching it."""
        return Fetched(self.of, view(self.like), self.dtype, self.device, (*self.views, view))

    @property
    def identity(self) -> object:
        """A value that is equal for two equal views of one weight."""
        return id(self.of[0]), self.of[1], self.like.shape, self.like.stride(), self.like.storage_offset()


def fetched(base_modules: Iterator[tuple[str, nn.Module]]) -> dict[int, Tensor]:
    """Return a `Fetched` tensor for each meta tensor that a hook fetches, by the meta tensor's id."""
    found: dict[int, Tensor] = {}
    for _, module in base_modules:
        for hook in _hooks(module):
            elsewhere = getattr(hook, "weights_map", None)
            if elsewhere is None:
                continue
            for name, own in (*module._parameters.items(), *module._buffers.items()):
                if own is None or not own.is_meta or id(own) in found:
                    continue
                device = torch.device(hook.execution_device if hook.execution_device is not None else "cpu")
                made: Tensor = Fetched((elsewhere, name), own.detach(), own.dtype, device)
                found[id(own)] = nn.Parameter(made, requires_grad=False) if isinstance(own, nn.Parameter) else made
    return found


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate's hooks run around a module's forward."""
    return HOOK in vars(module)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get(HOOK)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
