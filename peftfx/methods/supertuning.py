"""Super-tuning: trains the largest, or the smallest, entries of a weight (HF PEFT's `SupertuningConfig`).

The weight is `W' = W + scatter(values)`, at the share `1 - sparsity` of entries that are largest in the base, at least
one entry. If `r` is given, there is a LoRA too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import DeltaMethod, dropped
from peftfx.contract.common.lora.starts import fill_factors
from peftfx.contract.method import Base, Op, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

VALUES, INDICES, A, B = (f"supertuning_{name}" for name in ("values", "indices", "lora_A", "lora_B"))


@dataclass(frozen=True, kw_only=True)
class SuperTuning(DeltaMethod):
    """Trained changes of selected entries of linear weights.

    Args:
        sparsity: the share of the entries that are not trained.
        select_top: whether the entries with the largest magnitudes are trained; otherwise those with the smallest.
        r: the rank of an additional LoRA, if any.
        lora_alpha: the numerator of the LoRA's scale; by default `2 r`.
        lora_dropout: dropout on the LoRA's input in training.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.
        save_precomputed_indices: whether files have the places of the entries; otherwise these are found again in the
            base.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.SuperTuning(sparsity=0.99))
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    peft_type: ClassVar[str] = "SUPERTUNING"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise PeftfxError(
                f"sparsity must be a share below 1, not {self.sparsity}", "sparsity", "SuperTuning(sparsity=0.99)"
            )
        if self.r is not None and self.r < 1:
            raise PeftfxError(f"the rank must be 1 or more, not {self.r}", "r", "SuperTuning(r=8)")
        if self.r is None and self.lora_alpha is not None:
            raise PeftfxError("lora_alpha is given, and no rank", "lora_alpha", "give r too, or leave lora_alpha out")
        if self.r is not None and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2.0 * self.r)

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def keys(self, site: Site) -> dict[str, str]:
        saved = {VALUES: VALUES, **({INDICES: INDICES} if self.save_precomputed_indices else {})}
        return saved if self.r is None else {**saved, A: f"{A}.weight", B: f"{B}.weight"}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        scores, (out, inner) = base.weight.abs().flatten(), base.weight.shape
        count = max(1, int(scores.numel() * (1 - self.sparsity)))
        indices = scores.topk(count, largest=self.select_top).indices.to(torch.int32)
        values = base.weight.new_zeros(count, dtype=adapter_dtype(base.weight.dtype))
        p = {VALUES: values if self.init_weights else values.normal_(generator=rng), INDICES: indices}
        if self.r is None:
            return p
        a, b = values.new_zeros(self.r, inner), values.new_zeros(out, self.r)
        fill_factors(self.init_weights, site, a, b, rng)
        return {**p, A: a, B: b}

    def _scale(self) -> float:
        return (self.lora_alpha or 0.0) / (self.r or 1)

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        y = super().forward(site, op, x, y, base, {name: p[name] for name in (VALUES, INDICES)}, training)
        if self.r is None:
            return y
        low = F.linear(F.linear(dropped(x, self.lora_dropout, training).to(p[A].dtype), p[A]), p[B])
        return (y + self._scale() * low).to(y.dtype)

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        zeros = torch.zeros(weight.numel(), dtype=p[VALUES].dtype, device=p[VALUES].device)
        sparse = zeros.scatter_add(0, p[INDICES].long(), p[VALUES]).view(weight.shape)
        return sparse if A not in p else sparse + self._scale() * (p[B] @ p[A])
