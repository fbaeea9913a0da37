"""PSOFT: a trained rotation within the weight's principal subspace (Wu et al. 2025, openreview FSHrinMArK).

`B` [out, r] and `A` [r, in] are the largest part of the weight's singular value decomposition, divided by the scale
`s = alpha / r`. They are constants that files do not have, and are found again in the base's weight. `R` [r, r] between
them is trained: an orthogonal matrix between two diagonals. `forward` is `y + s B (R - I) A dropout(x)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.skew import cayley, skew_matrix
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, R, OUTER, INNER = "psoft_A", "psoft_B", "weight", "vector_b", "vector_a"


@dataclass(frozen=True, kw_only=True)
class PSOFT(WeightMethod):
    """An orthogonal matrix between the largest singular vectors of linear weights.

    Args:
        r: the rank of the subspace; at most the weight's rank.
        psoft_alpha: the numerator of the scale, `psoft_alpha / r`.
        psoft_dropout: dropout on the adapter's input in training.
        ab_svd_init: where the singular values are: in B (`psoft_init`), or their square roots in both factors
            (`pissa_init`).
        psoft_svd, psoft_svd_lowrank_niter, random_seed: how the factors are found: `full`, or `lowrank` in so many
            steps from a random start.
        psoft_orth: whether `R` is orthogonal, by Cayley's form of a skew matrix; otherwise `R` is any matrix.
        psoft_mag_a, psoft_mag_b: whether a diagonal is trained on the side of the input, and of the output.
        use_cayley_neumann, num_cayley_neumann_terms: Cayley's form as a sum of so many terms.
        cayley_neumann_eps: the largest length of the skew matrix for that sum.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        init_weights: whether a new adapter starts as the identity; otherwise it starts near the identity.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PSOFT(r=8, target="attention.query"))
    """

    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = "PSOFT"
    # Fused projections are adapted whole: singular values belong to the whole weight.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "num_cayley_neumann_terms")
        eps = self.cayley_neumann_eps
        if eps is not None and not 0 < eps < 1:
            hint = "PSOFT(cayley_neumann_eps=0.5)"
            raise PeftfxError(
                f"cayley_neumann_eps must be a number between 0 and 1, not {eps}", "cayley_neumann_eps", hint
            )

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def frozen(self) -> frozenset[str]:
        return frozenset({A, B})

    def keys(self, site: Site) -> dict[str, str]:
        sides = ((OUTER, self.psoft_mag_b), (INNER, self.psoft_mag_a))
        return {name: f"psoft_R.{name}" for name in (R, *(name for name, trained in sides if trained))}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if self.r > min(base.weight.shape):
            what = f"a weight of {list(base.weight.shape)} has no rank {self.r}"
            raise PeftfxError(what, site.path, f"r={min(base.weight.shape)} or less")
        new = base.weight.new_ones(self.r, dtype=adapter_dtype(base.weight.dtype))
        matrix = new.new_zeros(self.r * (self.r - 1) // 2) if self.psoft_orth else torch.diag(new)
        if not self.init_weights:
            matrix = matrix + 0.1 * torch.empty_like(matrix).normal_(generator=rng)
        p = {R: matrix} | {name: new.clone() for name in self.keys(site) if name != R}
        u, s, v = self._largest(base.weight.detach().float())
        s = s / (self.psoft_alpha / self.r)
        left, right = (s, torch.ones_like(s)) if self.ab_svd_init == "psoft_init" else (s.sqrt(), s.sqrt())
        return p | {A: (right[:, None] * v).contiguous(), B: u * left}

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight's largest singular values and vectors, [out, r], [r] and [r, in], as in HF PEFT."""
        if self.psoft_svd == "full":
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(self.random_seed)
                u, s, v = torch.svd_lowrank(weight, q=self.r, niter=self.psoft_svd_lowrank_niter)
            v = v.T
        return u[:, : self.r], s[: self.r], v[: self.r]

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        read = F.linear(dropped(x, self.psoft_dropout, training).to(p[A].dtype), p[A])
        return (y + F.linear(F.linear(read, self._turn(p)), p[B]) * (self.psoft_alpha / self.r)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        return Update(a=self._turn(p) @ p[A], b=p[B] * (self.psoft_alpha / self.r))

    def _turn(self, p: Params) -> Tensor:
        """Return `R - I`, in the dtype of the factors."""
        eye = torch.eye(self.r, dtype=p[A].dtype, device=p[A].device)
        matrix = self._orthogonal(p[R].to(eye.dtype), eye) if self.psoft_orth else p[R]
        matrix = p[OUTER][:, None] * matrix if self.psoft_mag_b else matrix
        return (matrix * p[INNER] if self.psoft_mag_a else matrix).to(eye.dtype) - eye

    def _orthogonal(self, upper: Tensor, eye: Tensor) -> Tensor:
        """Return Cayley's form `(I + Q) (I - Q)^-1` of the skew matrix `Q` with upper entries `upper`."""
        skew = skew_matrix(upper, self.r)
        if not self.use_cayley_neumann:
            return cayley(-skew)  # scaled before it is rounded, as in HF PEFT
        if self.cayley_neumann_eps is not None:
            skew = skew * (self.cayley_neumann_eps / skew.norm().clamp(min=self.cayley_neumann_eps))
        matrix, power, terms = eye, eye, self.num_cayley_neumann_terms
        last = terms - 1 if terms < 3 else max(terms, 4) - 1  # as in HF PEFT: with two terms no term counts half
        for term in range(1, last + 1):
            power = power @ skew
            matrix = matrix + (1 if term == last and terms > 2 else 2) * power
        return matrix
