"""FourierFT: a few trained coefficients of the update's Fourier transform (Gao et al. 2024, arXiv:2405.03003).

The update `scaling * Re ifft2(S)` is added to the weight. `S` is 0 except at `n_frequency` places, which are drawn from
a seed. `Re ifft2` is a sum of cosines, and `cos(a + b) = cos a cos b - sin a sin b`: so the update has rank
`2 n_frequency`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.common.patterns import by_loose_path, pattern_of
from peftfx.contract.common.spectral import SpectralMethod
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.update import Update
from peftfx.sites.site import Site

SPECTRUM, PLACES = "fourierft_spectrum", "fourierft_places"


@dataclass(frozen=True, kw_only=True)
class FourierFT(SpectralMethod):
    """Trained Fourier coefficients of an update of linear weights.

    Args:
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (fourier_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.FourierFT(n_frequency=200, scaling=100.0))
    """

    bias: Literal["none", "all", "fourier_only"] = "none"

    peft_type: ClassVar[str] = "FOURIERFT"
    spectrum: ClassVar[str] = SPECTRUM
    spread: ClassVar[float] = 1.0

    def at(self, site: Site) -> FourierFT:
        counts = self.n_frequency_pattern
        count = int(by_loose_path(counts, "n_frequency_pattern", site.path, self.n_frequency))
        return dataclasses.replace(self, n_frequency=count, n_frequency_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> FourierFT:
        counts = pattern_of(methods, "n_frequency", self.n_frequency, loose=True)
        return dataclasses.replace(self, n_frequency_pattern=counts)

    def frozen(self) -> frozenset[str]:
        return frozenset({PLACES})

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        places = self.places(base.weight.shape, site.path).int().to(base.weight.device)
        return {SPECTRUM: self.coefficients(base, self.n_frequency, rng), PLACES: places}

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        a, b = self._factors(weight, p)
        return b @ a

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = self._factors(base.weight, p)
        return Update(a=a, b=b)

    def _factors(self, weight: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Return the update's factors `A` [2 n, in] and `B` [out, 2 n]."""
        wide = torch.promote_types(p[SPECTRUM].dtype, torch.float32)
        turns = [_angles(size, p[PLACES][i].long(), wide) for i, size in enumerate(weight.shape)]
        rows, columns = turns[0].T, turns[1]
        scaled = p[SPECTRUM].to(wide) * (self.scaling / weight.numel())
        b = torch.cat([rows.cos() * scaled, -rows.sin() * scaled], 1)
        return torch.cat([columns.cos(), columns.sin()]), b


def _angles(size: int, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `2 pi k n / size` for each frequency `k` and place `n`, [frequencies, size], reduced modulo full turns.

    The products are whole numbers: in float32 those of a size above 4,096 would not be exact.
    """
    places = torch.arange(size, device=frequencies.device)
    return (frequencies[:, None] * places).remainder(size).to(dtype) * (2 * math.pi / size)
