"""LoraForms: rewrites a LoRA as another LoRA: for one site, for a rule, in a file, for a fused site, as a sum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from peftfx.contract.combination import Combination
from peftfx.contract.common.lora.blocks import DiagonalBlocks
from peftfx.contract.common.lora.factors import A0, B_BIAS, joined, stacked_factors
from peftfx.contract.common.lora.kasa import with_diagonal_in
from peftfx.contract.common.lora.refusals import for_layers_alone, refuse_on_parameters
from peftfx.contract.common.lora.starts import Start, is_random
from peftfx.contract.common.low_rank import A, B, summed, weighted_sum
from peftfx.contract.common.patterns import by_path, pattern_of
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.weight import Weighted, WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.expression import ends_with_any
from peftfx.sites.site import EXPERTS, Site


class LoraForms(WeightMethod):
    """The part of LoRA that rewrites its options and factors as those of another LoRA."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    init_lora_weights: Start
    use_bdlora: Mapping[str, object] | None
    kasa_config: Mapping[str, object] | None
    sums_by: ClassVar[str] = "svd"

    @property
    def scaling(self) -> float:
        """The factor `s`, the scale of the update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def at_layers_alone(self) -> bool:
        return bool(for_layers_alone(self, self.init_lora_weights))

    @property
    def blocks(self) -> DiagonalBlocks | None:
        """BD-LoRA's blocks, for a method that is configured for one site; or None."""
        return DiagonalBlocks.at(self.use_bdlora, "")

    def _at_parameter(self, site: Site) -> bool:
        """Return whether the rule names the weight of a site, and not its module."""
        return ends_with_any(site.parameter, self.target_parameters or ())

    def set_out(self, p: Params) -> Params:
        """Return the parameters of a plain LoRA: blocks expanded, and KaSA's diagonal multiplied into A."""
        if self.blocks is not None:
            p = {**p, self.blocks.factor: self.blocks.set_out(p[self.blocks.factor])}
        return with_diagonal_in(p)

    def at(self, site: Site) -> Self:
        """Return this method with the rank, alpha and blocks that the patterns give this site.

        Raises:
            PeftfxError: the site is a parameter without a layer of its own, and an option needs a layer.
        """
        if site.kind == EXPERTS or ends_with_any(site.path, self.target_parameters or ()):
            refuse_on_parameters(site, self, self.init_lora_weights)
        r = int(by_path(self.rank_pattern, "rank_pattern", site.path, self.r))
        alpha = by_path(self.alpha_pattern, "alpha_pattern", site.path, self.lora_alpha)
        blocks = DiagonalBlocks.at(self.use_bdlora, site.path)
        own = None if blocks is None else blocks.config()
        return self._with(r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={}, use_bdlora=own)

    def gather(self, methods: Mapping[str, Method]) -> Self:
        own = {path: m for path, m in methods.items() if isinstance(m, LoraForms)}
        starts = {m.init_lora_weights for m in own.values()} or {self.init_lora_weights}
        if len(starts) > 1:
            what = f"{self.init_lora_weights} at whole modules and at parts of others cannot be saved in one directory"
            raise PeftfxError(what, "init_lora_weights", "make an adapter of each (add_adapter), or export it merged")
        ranks, alphas = pattern_of(own, "r", self.r), pattern_of(own, "lora_alpha", self.lora_alpha)
        return self._with(rank_pattern=ranks, alpha_pattern=alphas, init_lora_weights=starts.pop())

    def naming(self, paths: Sequence[str], modules: Sequence[str]) -> Self:
        """Return the rule as for any method, but keep the names of targeted parameters."""
        own = [p for p in paths if not ends_with_any(p, self.target_parameters or ())]
        named = super().naming(own, modules)
        if len(own) == len(paths) or named.target_modules:
            return named
        return named._with(target_modules=())  # without target_modules HF PEFT makes its own choice

    def written(self, p: Params) -> tuple[Self, dict[str, Tensor]]:
        """Return LoRA of twice the rank, with the start in it, if the start is random and cannot be made again."""
        if not (is_random(self.init_lora_weights) and A0 in p):
            return self, dict(p)
        return self._without_start([p]), joined(p)

    def taken_back(self, p: Params, rule: Method, saved: Params, path: str) -> dict[str, Tensor] | None:
        """Return the factors of a file that has a random start beside them, if it is the start that is here."""
        written, begun = self.written(p)
        if written is self or {n: t.shape for n, t in begun.items()} != {n: t.shape for n, t in saved.items()}:
            return None
        r = len(p[A])
        apart = {**saved, A: saved[A][:r], B: saved[B][:, :r]}
        again = joined({**p, **apart})
        same = all(torch.equal(again[name], saved[name]) for name in (A, B))
        return apart if same else None

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[Self, dict[str, Tensor]]:
        """Return one LoRA of the whole site. Alpha grows with the rank, so that the scale stays the same."""
        if self.use_bdlora is not None or self.kasa_config is not None:
            return super().whole(site, base, parts)
        if any(A0 in q for q in parts.values()):
            plain = {rows: joined(q) for rows, q in parts.items()}
            return self._without_start(parts.values()).whole(site, base, plain)
        return self._of_rank(self.r * len(parts)), stacked_factors(site, base.weight, parts)

    def _without_start(self, parts: Iterable[Params]) -> Self:
        """Return LoRA of twice the rank without a start from the weight, as parts start from own rows."""
        return self._of_rank(2 * next(iter(parts))[A].shape[0])._with(init_lora_weights=True)

    def _of_rank(self, r: int) -> Self:
        """Return LoRA of another rank with the same scale."""
        return self._with(r=r, lora_alpha=self.scaling * (math.sqrt(r) if self.use_rslora else r))

    @classmethod
    def combined(
        cls, site: Site, how: Combination, given: Sequence[Weighted]
    ) -> tuple[WeightMethod, dict[str, Tensor]]:
        """Return the combination by `low_rank.summed`, each adapter's weight times its scale; the new scale is 1."""
        loras = [method for _, method, _ in given if isinstance(method, LoraForms)]
        params = [m._summand(site, how, w.params) for m, w in zip(loras, given, strict=True)]
        weights, scales = [w.weight for w in given], [m.scaling for m in loras]
        a, b = summed(site, how, weights, scales, [(q[A], q[B]) for q in params])
        new = {A: a, B: b}
        biased = [(w * s, q[B_BIAS]) for w, s, q in zip(weights, scales, params, strict=True) if B_BIAS in q]
        if biased:
            new[B_BIAS] = weighted_sum(*zip(*biased, strict=True))
        r = len(a) // (site.shape[0] if site.kind == EXPERTS else 1)
        plain = loras[0]._with(use_rslora=False, init_lora_weights=True, bias="none", use_bdlora=None, kasa_config=None)
        return plain._with(r=r, lora_alpha=r, lora_bias=bool(biased)), new

    def of_file(self) -> object:
        """Return whether B has a bias. An embedding has no place for one, so a sum may be two rules."""
        return self.lora_bias

    def alike(self, site: Site, p: Params, others: Collection[object]) -> tuple[WeightMethod, Params]:
        """Give B a bias of zeros if B has one at another place, and can have one here."""
        if True not in others or self.lora_bias or site.kind in ("embedding", EXPERTS) or self._at_parameter(site):
            return self, p
        return self._with(lora_bias=True), {**p, B_BIAS: p[B].new_zeros(len(p[B]))}

    def _summand(self, site: Site, how: Combination, p: Params) -> Params:
        """Return the adapter's factors as those of a plain LoRA.

        Raises:
            PeftfxError: the adapter cannot be summed.
        """
        if self.unfoldable:
            raise PeftfxError(self.unfoldable, site.path, "make one active at a time")
        if self.use_dora:
            hint = "merge one, or make one active at a time"
            raise PeftfxError("DoRA adapters cannot be summed: their magnitudes have no sum", site.path, hint)
        if A0 in p and not how.cuts and how.combination_type != "cat":
            what = "LoRAs that start from the weight (PiSSA, OLoRA) can be summed by cat alone"
            raise PeftfxError(what, site.path, "combination_type='cat'")
        q = self.set_out(p)
        return joined(q) if A0 in q else q

    def _with(self, **options: object) -> Self:
        return dataclasses.replace(self, **options)  # type: ignore[arg-type]
