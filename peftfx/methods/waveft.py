"""WaveFT: a few trained coefficients of the update's wavelet transform (Bilican et al. 2025, arXiv:2505.12532).

`scaling * idwt2(S)` is added to the weight, `S` being 0 but at `n_frequency` places drawn from a seed; its quarters are
the four bands of one step of the transform. Each coefficient is a product of two short vectors, and thousands of them
have the weight's own rank: there is no low-rank sum to tell.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import DeltaMethod
from peftfx.contract.common.patterns import by_path, pattern_of
from peftfx.contract.method import Base, Method, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

SPECTRUM, PLACES, LOW = "waveft_spectrum", "waveft_places", "waveft_low_pass"
_MOST = 10  #: vanishing moments whose filters come out of a root finder to rounding


@dataclass(frozen=True, kw_only=True)
class WaveFT(DeltaMethod):
    """Trained wavelet coefficients of an update of linear weights.

    Args:
        n_frequency: how many coefficients.
        scaling: the factor of the update.
        wavelet_family: Daubechies' wavelets, db1 (Haar) to db10; sym2 and sym3 are db2 and db3.
        use_idwt: transform the coefficients; else they are elements of the update themselves.
        random_loc_seed: the seed of their places.
        proportional_parameters: spread coefficients over places by their sizes: refused, no config holds the counts.
        fan_in_fan_out: how the weight is stored; read from the graph, kept for HF PEFT's sake.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (waveft_only).
        n_frequency_pattern: another `n_frequency` for module paths that match a key.
        init_weights: start as the identity; otherwise at random.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    proportional_parameters: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = True

    peft_type: ClassVar[str] = "WAVEFT"
    # Fused projections as wholes: the transform is of the whole weight, and HF PEFT's files know no parts.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_frequency < 1 or any(n < 1 for n in self.n_frequency_pattern.values()):
            what = f"the number of coefficients must be 1 or more, not {self.n_frequency}"
            raise PeftfxError(what, "n_frequency", "WaveFT(n_frequency=2592)")
        if self.proportional_parameters:
            what = "counts by size depend on all places at once, and a config holds none of them"
            raise PeftfxError(what, "proportional_parameters", "name the counts in n_frequency_pattern")
        found = re.fullmatch(r"db(\d+)|sym[23]", self.wavelet_family)
        if found is None or not 1 <= _moments(self.wavelet_family) <= _MOST:
            what = f"the wavelet {self.wavelet_family!r} is not here"
            raise PeftfxError(what, "wavelet_family", f"db1 to db{_MOST}; or merge it with peft")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def at(self, site: Site) -> WaveFT:
        count = int(by_path(self.n_frequency_pattern, "n_frequency_pattern", site.path, self.n_frequency))
        return dataclasses.replace(self, n_frequency=count, n_frequency_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> WaveFT:
        return dataclasses.replace(self, n_frequency_pattern=pattern_of(methods, "n_frequency", self.n_frequency))

    def frozen(self) -> frozenset[str]:
        return frozenset({PLACES, LOW})

    def keys(self, site: Site) -> dict[str, str]:
        return {SPECTRUM: SPECTRUM}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), device = base.weight.shape, base.weight.device
        if self.n_frequency > out * inner:
            what = f"{self.n_frequency} coefficients of a weight of {out} x {inner}"
            hint = f"n_frequency={out * inner} or less, in n_frequency_pattern for it alone"
            raise PeftfxError(what, site.path, hint)
        own = torch.Generator().manual_seed(self.random_loc_seed)
        places = torch.randperm(out * inner, generator=own)[: self.n_frequency]
        spectrum = torch.zeros(self.n_frequency, dtype=adapter_dtype(base.weight.dtype), device=device)
        if not self.init_weights:
            spectrum.normal_(std=0.01, generator=rng)
        low = torch.tensor(_low_pass(_moments(self.wavelet_family)), dtype=spectrum.dtype, device=device)
        indices = torch.stack([places // inner, places % inner]).int().to(device)
        return {SPECTRUM: spectrum, PLACES: indices, **({LOW: low} if self.use_idwt else {})}

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
    """Daubechies' reconstruction filter of so many vanishing moments, [2 moments]: the roots of least phase.

    `(1 + z)^n` times a factor `q` with `q(z) q(1 / z) = sum_k C(n - 1 + k, k) y^k` at `y = (2 - z - 1 / z) / 4`.
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
