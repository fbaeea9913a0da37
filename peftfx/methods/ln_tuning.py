"""LN tuning: only the norms are trained (Zhao et al. 2023, arXiv:2312.11420).

Each norm gets a copy of its own weight and bias, and its own forward reads the copy. So the kind of norm, and how its
code is written, make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftfx.contract.override import OverrideMethod
from peftfx.sites.site import NORM, Site


@dataclass(frozen=True, kw_only=True)
class LNTuning(OverrideMethod):
    """Trained copies of the norms' parameters: layer, RMS, group and batch norms, also in plain arithmetic.

    Args:
        target_modules: as in HF PEFT, which copies every named module, norm or not; by default every norm.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LNTuning())
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    default_target: ClassVar[str] = NORM
    layered: ClassVar[bool] = False

    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        return names

    def suffix(self, name: str) -> str:
        return f"ln_tuning_layers.{name}"
