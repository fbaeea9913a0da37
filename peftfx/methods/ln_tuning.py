"""LN tuning: the norms are trained, and nothing else (Zhao et al. 2023, arXiv:2312.11420).

Each norm gets a copy of its own weight and bias; `forward` is the norm's own, on the copy. So it makes no difference
which norm it is, or how it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftfx.contract.override import OverrideMethod
from peftfx.sites.site import NORM, Site


@dataclass(frozen=True, kw_only=True)
class LNTuning(OverrideMethod):
    """Trains copies of the norms: layer, RMS, group and batch norms, written by hand or not.

    Args:
        target_modules: as in HF PEFT, which copies whatever module is named; by default every norm.

    Example:
        >>> adapted = peftfx.transform(model, peftfx.LNTuning())
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    default_target: ClassVar[str] = NORM
    layered: ClassVar[bool] = False

    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        return names

    def suffix(self, name: str) -> str:
        return f"ln_tuning_layers.{name}"
