"""BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

HF PEFT has this only as a part of LoRA, `bias="all"`, without a type or files of its own. peftfx writes the layout of
HF PEFT's directories with the type `BITFIT`. peftfx reads such files, and HF PEFT refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftfx.contract.override import OverrideMethod
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class BitFit(OverrideMethod):
    """Trained copies of the biases of linear layers, convolutions and norms.

    Args:
        target: the layers whose biases are trained; by default all layers that have a tensor named `bias`.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.BitFit())
    """

    peft_type: ClassVar[str] = "BITFIT"
    default_target: ClassVar[str] = "/.*/"

    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name == "bias"]

    def suffix(self, name: str) -> str:
        return name
