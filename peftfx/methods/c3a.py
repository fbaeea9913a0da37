"""C3A: an update of circulant blocks, which compute convolutions (Chen et al. 2024, arXiv:2407.19342).

The weight is cut into blocks of `block_size`. To each block a circulant matrix is added: its columns are cyclic shifts
of one trained vector, divided by the number of inputs. Circulant matrices have full rank: there is no low-rank update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.common.delta import DeltaMethod
from peftfx.contract.common.patterns import by_loose_path, pattern_of, refuse_small
from peftfx.contract.method import Base, Method, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

KERNEL = "c3a_kernel"


@dataclass(frozen=True, kw_only=True)
class C3A(DeltaMethod):
    """Circulant blocks, each of one trained vector, added to linear weights.

    Args:
        block_size: the size of the blocks, a divisor of the inputs and the outputs.
        block_size_pattern: another `block_size` for module paths that match a key.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (c3a_only).
        init_weights: True starts as the identity; otherwise "gaussian", "kaiming_uniform" or "xavier_uniform" (also
            False).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.C3A(block_size=32, target="mlp"))
    """

    block_size: int = 256
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "c3a_only"] = "none"
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    peft_type: ClassVar[str] = "C3A"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self.block_size_pattern
        refuse_small(
            "the block size", "block_size", self.block_size, pattern, "C3A(block_size=64)", "block_size_pattern"
        )

    @property
    def neutral(self) -> bool:
        return self.init_weights is True

    def at(self, site: Site) -> C3A:
        size = int(by_loose_path(self.block_size_pattern, "block_size_pattern", site.path, self.block_size))
        return dataclasses.replace(self, block_size=size, block_size_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> C3A:
        sizes = pattern_of(methods, "block_size", self.block_size, loose=True)
        return dataclasses.replace(self, block_size_pattern=sizes)

    def keys(self, site: Site) -> dict[str, str]:
        return {KERNEL: KERNEL}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), size = base.weight.shape, self.block_size
        if out % size or inner % size:
            what = f"blocks of {size} do not divide a weight of {out} x {inner}"
            raise PeftfxError(
                what, site.path, "give a common divisor; block_size_pattern sets it for this module alone"
            )
        kernel = torch.zeros(out // size, inner // size, size, device=base.weight.device)
        if self.init_weights == "gaussian":
            kernel.normal_(generator=rng)
        elif self.init_weights is not True:
            bound = inner**-0.5 if self.init_weights == "kaiming_uniform" else (6 / (out + inner)) ** 0.5
            kernel.uniform_(-bound, bound, generator=rng)
        return {KERNEL: kernel}

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        kernel, size = p[KERNEL], self.block_size
        places = torch.arange(size, device=kernel.device)
        turned = kernel[:, :, (places - places[:, None]) % size]  # [out blocks, in blocks, row, column]
        return turned.transpose(1, 2).reshape(weight.shape) / weight.shape[1]
