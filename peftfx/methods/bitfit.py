"""BitFit: the biases are trained, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199).

HF PEFT has it as LoRA's `bias="all"`, and never alone: it has no type for it, and no file. What is written here has the
layout of HF PEFT's directories and the type `BITFIT`; peftfx reads it, and HF PEFT refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftfx.contract.override import OverrideMethod
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class BitFit(OverrideMethod):
    """Trains copies of the biases of linear layers, convolutions and norms.

    Args:
        target: the layers whose biases are trained; by default every one that has a tensor named `bias`.

    Example:
        >>> adapted = peftfx.transform(model, peftfx.BitFit())
    """

    peft_type: ClassVar[str] = "BITFIT"
    default_target: ClassVar[str] = "/.*/"

    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name == "bias"]

    def suffix(self, name: str) -> str:
        return name
