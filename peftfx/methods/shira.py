"""SHiRA: trains a few elements of the weight, at fixed places (Bhardwaj et al. 2024, arXiv:2406.13175).

`r (inputs + outputs)` trained numbers are added to the weight, at the places of a mask: random places, or those of a
file. The update has few numbers but a high rank, and so no low-rank form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.delta import DeltaMethod
from peftfx.contract.method import Base, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

WEIGHT, INDICES = "shira_weight", "shira_indices"


@dataclass(frozen=True, kw_only=True)
class SHiRA(DeltaMethod):
    """A sparse update of linear weights.

    Args:
        r: the update has as many numbers as a LoRA of this rank.
        mask_type: how places are chosen: "random". Files have their places, whatever mask they came from.
        random_seed: the seed of the random places; by default the adapter's own.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.SHiRA(r=8))
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = "SHIRA"
    # Fused projections are adapted whole: HF PEFT's files have no parts, and the whole weight's number of places.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def obstacle(self) -> PeftfxError | None:
        if self.mask_type == "random":
            return None
        what = f"the mask {self.mask_type!r} is a function of HF PEFT's user, which no config holds"
        return PeftfxError(
            what, "mask_type", "SHiRA(mask_type='random'); or start it with peft, save it, and load that"
        )

    def frozen(self) -> frozenset[str]:
        return frozenset({INDICES})

    def keys(self, site: Site) -> dict[str, str]:
        return {WEIGHT: WEIGHT, INDICES: INDICES}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), device = base.weight.shape, base.weight.device
        count = self.r * (out + inner)
        if count > out * inner:
            what = f"r={self.r} asks for {count} numbers of a weight of {out} x {inner}"
            raise PeftfxError(what, site.path, f"r={out * inner // (out + inner)} or less")
        seeded = rng if self.random_seed is None else torch.Generator().manual_seed(self.random_seed)
        places = torch.randperm(out * inner, generator=seeded)[:count].sort().values.to(device)
        weight = torch.zeros(count, dtype=adapter_dtype(base.weight.dtype), device=device)
        if not self.init_weights:
            weight.normal_(generator=rng)
        return {WEIGHT: weight, INDICES: torch.stack([places // inner, places % inner]).int()}

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        rows, columns = p[INDICES].long().unbind()
        places = rows * weight.shape[1] + columns
        return p[WEIGHT].new_zeros(weight.numel()).scatter(0, places, p[WEIGHT]).view(weight.shape)
