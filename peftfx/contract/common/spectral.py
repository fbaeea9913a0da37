"""SpectralMethod: a method that trains a few coefficients of the update's transform, at places drawn from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import DeltaMethod
from peftfx.contract.common.patterns import by_path, pattern_of, refuse_small
from peftfx.contract.method import Base, Method
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(DeltaMethod):
    """A few trained coefficients of a transform of a linear weight's update; all other coefficients are 0.

    Args:
        n_frequency: the number of coefficients.
        scaling: the factor of the update.
        random_loc_seed: the seed of the coefficients' places.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        n_frequency_pattern: another `n_frequency` for module paths that match a key.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = True

    spectrum: ClassVar[str]
    """The name of the coefficients, here and in files."""
    spread: ClassVar[float]
    """The standard deviation of a random start."""
    # Fused projections are adapted whole: the transform is of the whole weight, and HF PEFT's files have no parts.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = f"{type(self).__name__}(n_frequency=1000)"
        pattern = self.n_frequency_pattern
        refuse_small(
            "the number of coefficients", "n_frequency", self.n_frequency, pattern, hint, "n_frequency_pattern"
        )

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def at(self, site: Site) -> Self:
        count = int(by_path(self.n_frequency_pattern, "n_frequency_pattern", site.path, self.n_frequency))
        return dataclasses.replace(self, n_frequency=count, n_frequency_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> Self:
        return dataclasses.replace(self, n_frequency_pattern=pattern_of(methods, "n_frequency", self.n_frequency))

    def keys(self, site: Site) -> dict[str, str]:
        return {self.spectrum: self.spectrum}

    def places(self, shape: Sequence[int], where: str) -> Tensor:
        """Return rows and columns of the coefficients in a weight, int64[2, n_frequency], as in HF PEFT.

        Raises:
            PeftfxError: the weight has fewer elements than there are coefficients.
        """
        out, inner = shape
        if self.n_frequency > out * inner:
            what = f"n_frequency={self.n_frequency} is more than the elements of a weight of {out} x {inner}"
            hint = f"n_frequency={out * inner} or less, in n_frequency_pattern for it alone"
            raise PeftfxError(what, where, hint)
        own = torch.Generator().manual_seed(self.random_loc_seed)
        drawn = torch.randperm(out * inner, generator=own)[: self.n_frequency]
        return torch.stack([drawn // inner, drawn % inner])

    def coefficients(self, base: Base, count: int, rng: torch.Generator | None) -> Tensor:
        """Return `count` new coefficients."""
        new = base.weight.new_zeros(count, dtype=adapter_dtype(base.weight.dtype))
        return new if self.init_weights else new.normal_(std=self.spread, generator=rng)
