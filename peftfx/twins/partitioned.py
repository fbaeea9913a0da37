"""Weights that DeepSpeed's ZeRO-3 has partitioned, gathered from the processes when their values are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from peftfx.sharding.parts import full, is_zero3_part
from peftfx.twins.offloaded import Fetched


class _Gathered(Mapping[str, Tensor]):
    """One partitioned weight, by its name. All processes read it, in the same order."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self._name, self._parameter = name, parameter

    def __getitem__(self, name: str) -> Tensor:
        if name != self._name:
            raise KeyError(name)
        return full(self._parameter)

    def __iter__(self) -> Iterator[str]:
        return iter((self._name,))

    def __len__(self) -> int:
        return 1


def partitioned(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return a `Fetched` tensor for each parameter that ZeRO-3 has partitioned, by the parameter's id."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for name, own in module._parameters.items():
            if own is None or id(own) in found or not is_zero3_part(own):
                continue
            like = torch.empty(own.ds_shape, dtype=own.dtype, device="meta")  # type: ignore[attr-defined]
            made = Fetched((_Gathered(name, own), name), like, own.dtype, own.device)
            found[id(own)] = nn.Parameter(made, requires_grad=False)
    return found
