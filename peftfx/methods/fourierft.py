"""FourierFT: a few trained coefficients of the update's Fourier transform (Gao et al. 2024, arXiv:2405.03003).

`scaling * Re ifft2(S)` is added to the weight, `S` being 0 but at `n_frequency` places drawn from a seed. Written out,
`Re ifft2` is a sum of cosines, `cos(a + b) = cos a cos b - sin a sin b`: an update of rank `2 n_frequency`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import DeltaMethod
from peftfx.contract.common.patterns import by_path, pattern_of
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

SPECTRUM, PLACES = "fourierft_spectrum", "fourierft_places"


@dataclass(frozen=True, kw_only=True)
class FourierFT(DeltaMethod):
    """Trained Fourier coefficients of an update of linear weights.

    Args:
        n_frequency: how many coefficients.
        scaling: the factor of the update.
        random_loc_seed: the seed of their places.
        fan_in_fan_out: how the weight is stored; read from the graph, kept for HF PEFT's sake.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (fourier_only).
        n_frequency_pattern: another `n_frequency` for module paths that match a key.
        init_weights: start as the identity; otherwise at random.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = True

    peft_type: ClassVar[str] = "FOURIERFT"
    # Fused projections as wholes: the transform is of the whole weight, and HF PEFT's files know no parts.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_frequency < 1 or any(n < 1 for n in self.n_frequency_pattern.values()):
            what = f"the number of coefficients must be 1 or more, not {self.n_frequency}"
            raise PeftfxError(what, "n_frequency", "FourierFT(n_frequency=1000)")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def at(self, site: Site) -> FourierFT:
        count = int(by_path(self.n_frequency_pattern, "n_frequency_pattern", site.path, self.n_frequency))
        return dataclasses.replace(self, n_frequency=count, n_frequency_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> FourierFT:
        counts = pattern_of(methods, "n_frequency", self.n_frequency, escaped=False)
        return dataclasses.replace(self, n_frequency_pattern=counts)

    def frozen(self) -> frozenset[str]:
        return frozenset({PLACES})

    def keys(self, site: Site) -> dict[str, str]:
        return {SPECTRUM: SPECTRUM}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), device = base.weight.shape, base.weight.device
        if self.n_frequency > out * inner:
            what = f"{self.n_frequency} coefficients of a weight of {out} x {inner}"
            raise PeftfxError(
                what, site.path, f"n_frequency={out * inner} or less, in n_frequency_pattern for it alone"
            )
        own = torch.Generator().manual_seed(self.random_loc_seed)
        places = torch.randperm(out * inner, generator=own)[: self.n_frequency]
        spectrum = torch.zeros(self.n_frequency, dtype=adapter_dtype(base.weight.dtype), device=device)
        if not self.init_weights:
            spectrum.normal_(generator=rng)
        return {SPECTRUM: spectrum, PLACES: torch.stack([places // inner, places % inner]).float().to(device)}

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        a, b = self._factors(weight, p)
        return b @ a

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = self._factors(base.weight, p)
        return Update(a=a, b=b)

    def _factors(self, weight: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """`A` [2 n, in] and `B` [out, 2 n], of the update."""
        turns = [_angles(size, p[PLACES][i].to(p[SPECTRUM].dtype)) for i, size in enumerate(weight.shape)]
        rows, columns = turns[0].T, turns[1]
        scaled = p[SPECTRUM] * (self.scaling / weight.numel())
        b = torch.cat([rows.cos() * scaled, -rows.sin() * scaled], 1)
        return torch.cat([columns.cos(), columns.sin()]), b


def _angles(size: int, frequencies: Tensor) -> Tensor:
    """`2 pi k n / size` for each frequency `k` and place `n`, [frequencies, size]; whole turns go first."""
    places = torch.arange(size, dtype=frequencies.dtype, device=frequencies.device)
    return (frequencies[:, None] * places).remainder(size) * (2 * math.pi / size)
