"""WaveFT: a few trained coefficients of the update's wavelet transform (Bilican et al. 2025, arXiv:2505.12532).

The update `scaling * idwt2(S)` is added to the weight. `S` is 0 except at `n_frequency` places, which are drawn from a
seed. Its quarters are the four bands of one step of the transform. Each coefficient gives a product of two short
vectors, and thousands of them have the weight's full rank: there is no low-rank update.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.spectral import SpectralMethod
from peftfx.contract.method import Base, Method, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

SPECTRUM, PLACES, LOW = "waveft_spectrum", "waveft_places", "waveft_low_pass"
_MOST = 10  #: the most vanishing moments for which a root finder gives exact filters, up to rounding


@dataclass(frozen=True, kw_only=True)
class WaveFT(SpectralMethod):
    """Trained wavelet coefficients of an update of linear weights.

    Args:
        wavelet_family: Daubechies' wavelets, db1 (Haar) to db10; sym2 and sym3 are db2 and db3.
        use_idwt: whether the coefficients are transformed; otherwise they are elements of the update.
        proportional_parameters: whether places with larger weights get more coefficients: `n_frequency` on average, and
            at least 1. Then `n_frequency_pattern` is not read, as in HF PEFT.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (waveft_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.WaveFT(n_frequency=200))
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"

    peft_type: ClassVar[str] = "WAVEFT"
    spectrum: ClassVar[str] = SPECTRUM
    spread: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        found = re.fullmatch(r"db(\d+)|sym[23]", self.wavelet_family)
        if found is None or not 1 <= _moments(self.wavelet_family) <= _MOST:
            what = f"peftfx does not have the wavelet {self.wavelet_family!r}"
            raise PeftfxError(what, "wavelet_family", f"db1 to db{_MOST}; or merge it with peft")

    @property
    def counted(self) -> bool:
        return self.proportional_parameters

    def at(self, site: Site) -> WaveFT:
        return self if self.proportional_parameters else super().at(site)

    def gather(self, methods: Mapping[str, Method]) -> WaveFT:
        return self if self.proportional_parameters else super().gather(methods)

    def frozen(self) -> frozenset[str]:
        return frozenset({PLACES, LOW})

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the coefficients' places by the number of each place, if their count depends on all places."""
        if not self.proportional_parameters:
            return {}
        shapes = [site.shape[::-1] if site.transposed else site.shape for site in sites]
        total, budget = sum(out * inner for out, inner in shapes), self.n_frequency * len(shapes)
        made = {}
        for number, ((out, inner), site) in enumerate(zip(shapes, sites, strict=True)):
            count = max(1, round(out * inner / total * budget))  # as HF PEFT computes it, to round alike
            own = dataclasses.replace(self, n_frequency=count)
            made[f"{PLACES}_{number}"] = own.places((out, inner), site.path).int().to(like.device)
        return made

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        return {PLACES: f"{PLACES}_{sites.index(site)}"} if self.proportional_parameters else {}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        dtype, device = adapter_dtype(base.weight.dtype), base.weight.device
        low = torch.tensor(_low_pass(_moments(self.wavelet_family)), dtype=dtype, device=device)
        p = {LOW: low} if self.use_idwt else {}
        if self.proportional_parameters:
            return p
        places = self.places(base.weight.shape, site.path).int().to(device)
        return p | {PLACES: places, SPECTRUM: self.coefficients(base, self.n_frequency, rng)}

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        if not self.proportional_parameters:
            return {}
        return {SPECTRUM: self.coefficients(base, shared[PLACES].shape[1], rng)}

    def changes_nothing(self, saved: Mapping[str, Tensor]) -> bool:
        return saved.keys() == {SPECTRUM} and not bool(saved[SPECTRUM].any())

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        rows, columns = p[PLACES].long().unbind()
        out, inner = weight.shape
        if not self.use_idwt:
            return self._spread(p[SPECTRUM], rows * inner + columns, out, inner) * self.scaling
        low, length = p[LOW], len(p[LOW])
        high = low.flip(0) * (1 - 2 * (torch.arange(length, device=low.device) % 2))
        tall, wide = ((size + length - 1) // 2 * 2 for size in (out, inner))  # room for the filter, even
        rows, columns = rows + (tall - out) // 2, columns + (wide - inner) // 2
        bands = self._spread(p[SPECTRUM], rows * wide + columns, tall, wide)
        bands = bands.view(2, tall // 2, 2, wide // 2).transpose(1, 2).reshape(1, 4, tall // 2, wide // 2)
        filters = torch.stack([torch.outer(a, b) for b in (low, high) for a in (low, high)])
        given = F.conv_transpose2d(bands, filters[:, None], stride=2)[0, 0, length - 2 :, length - 2 :]
        return given[:out, :inner] * self.scaling

    @staticmethod
    def _spread(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
        return values.new_zeros(rows * columns).scatter(0, places, values).view(rows, columns)


def _moments(family: str) -> int:
    return int(family.lstrip("dbsym"))


@functools.cache
def _low_pass(moments: int) -> tuple[float, ...]:
    """Return Daubechies' reconstruction filter of `moments` vanishing moments, [2 moments]: roots of least phase.

    The filter is `(1 + z)^n` times a factor `q` with `q(z) q(1 / z) = sum_k C(n - 1 + k, k) y^k` at
    `y = (2 - z - 1 / z) / 4`.
    """
    product, power = np.zeros(2 * moments - 1), np.ones(1)
    for k in range(moments):
        binomial = np.prod([(moments - 1 + i) / i for i in range(1, k + 1)])
        at = moments - 1 - k
        product[at : at + len(power)] += binomial * power
        power = np.convolve(power, [-0.25, 0.5, -0.25])
    roots = np.roots(product)
    filter_ = np.real(np.poly([*roots[np.abs(roots) < 1], *[-1.0] * moments]))
    return tuple(filter_ * (np.sqrt(2) / filter_.sum()))
