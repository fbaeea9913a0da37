"""The names that the author of a method imports; see `peftfx.contract`."""

from peftfx.contract.attention import AttentionMethod
from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.override import OverrideMethod
from peftfx.contract.sequence import PromptMethod, SequenceMethod
from peftfx.contract.update import Update
from peftfx.contract.weight import Weighted, WeightMethod
from peftfx.sites.blocks import Rows

__all__ = [
    "AttentionMethod",
    "Base",
    "Method",
    "Op",
    "OverrideMethod",
    "Params",
    "PromptMethod",
    "Rows",
    "SequenceMethod",
    "Update",
    "WeightMethod",
    "Weighted",
    "adapter_dtype",
]
