"""peftfx: one file per method, sites read from the graph, every adapter down to one ONNX model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peftfx.version import __version__

if TYPE_CHECKING:
    from peftfx import runtime as runtime
    from peftfx.errors import PeftfxError
    from peftfx.export import export_adapter, export_onnx
    from peftfx.graph.graph import Graph
    from peftfx.methods.adalora import AdaLoRA
    from peftfx.methods.bitfit import BitFit
    from peftfx.methods.ia3 import IA3
    from peftfx.methods.llama_adapter import LlamaAdapter
    from peftfx.methods.ln_tuning import LNTuning
    from peftfx.methods.lora import LoRA
    from peftfx.methods.p_tuning import PTuning
    from peftfx.methods.prefix_tuning import PrefixTuning
    from peftfx.methods.prompt_tuning import PromptTuning
    from peftfx.methods.trainable_tokens import TrainableTokens
    from peftfx.methods.vera import VeRA
    from peftfx.model.adapted import AdaptedModel
    from peftfx.model.api import inspect, load, plan, transform
    from peftfx.model.trainer_callbacks import RankAllocation
    from peftfx.sites.site import Site
    from peftfx.sites.sites import Sites
    from peftfx.views.capture import capture


# Names are imported when first used: torch and transformers take seconds, and `peftfx --help` needs neither.
_HOME = {
    "AdaLoRA": "peftfx.methods.adalora",
    "AdaptedModel": "peftfx.model.adapted",
    "BitFit": "peftfx.methods.bitfit",
    "Graph": "peftfx.graph.graph",
    "IA3": "peftfx.methods.ia3",
    "LNTuning": "peftfx.methods.ln_tuning",
    "LlamaAdapter": "peftfx.methods.llama_adapter",
    "LoRA": "peftfx.methods.lora",
    "PTuning": "peftfx.methods.p_tuning",
    "PeftfxError": "peftfx.errors",
    "PrefixTuning": "peftfx.methods.prefix_tuning",
    "PromptTuning": "peftfx.methods.prompt_tuning",
    "RankAllocation": "peftfx.model.trainer_callbacks",
    "Site": "peftfx.sites.site",
    "Sites": "peftfx.sites.sites",
    "TrainableTokens": "peftfx.methods.trainable_tokens",
    "VeRA": "peftfx.methods.vera",
    "capture": "peftfx.views.capture",
    "export_adapter": "peftfx.export",
    "export_onnx": "peftfx.export",
    "inspect": "peftfx.model.api",
    "load": "peftfx.model.api",
    "plan": "peftfx.model.api",
    "transform": "peftfx.model.api",
}

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdaptedModel",
    "BitFit",
    "Graph",
    "LNTuning",
    "LlamaAdapter",
    "LoRA",
    "PTuning",
    "PeftfxError",
    "PrefixTuning",
    "PromptTuning",
    "RankAllocation",
    "Site",
    "Sites",
    "TrainableTokens",
    "VeRA",
    "__version__",
    "capture",
    "export_adapter",
    "export_onnx",
    "inspect",
    "load",
    "plan",
    "runtime",
    "transform",
]


def __getattr__(name: str) -> object:
    if name == "runtime":
        return importlib.import_module("peftfx.runtime")
    if name not in _HOME:
        raise AttributeError(f"module 'peftfx' has no attribute {name!r}")
    # Bound here for good: importing the submodule of the same name would put the module in its function's place.
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
