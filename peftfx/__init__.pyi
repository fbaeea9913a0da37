"""Made by `python tests/house/public_stub.py`; what is public is told in `__init__.py`."""

from peftfx import runtime as runtime
from peftfx import testing as testing
from peftfx.contract.pattern import PatternMethod as PatternMethod
from peftfx.errors import PeftfxError as PeftfxError
from peftfx.export.onnx_directory import export_onnx as export_onnx
from peftfx.export.slots.adapter_export import export_adapter as export_adapter
from peftfx.export_options.export import ExportOptions as ExportOptions
from peftfx.graph.graph import Graph as Graph
from peftfx.methods import register as register
from peftfx.methods.adalora import AdaLoRA as AdaLoRA
from peftfx.methods.adamss import AdaMSS as AdaMSS
from peftfx.methods.beft import BEFT as BEFT
from peftfx.methods.bitfit import BitFit as BitFit
from peftfx.methods.boft import BOFT as BOFT
from peftfx.methods.c3a import C3A as C3A
from peftfx.methods.cartridge import Cartridge as Cartridge
from peftfx.methods.cpt import CPT as CPT
from peftfx.methods.deft import DEFT as DEFT
from peftfx.methods.delora import DeLoRA as DeLoRA
from peftfx.methods.fourierft import FourierFT as FourierFT
from peftfx.methods.frod import FRoD as FRoD
from peftfx.methods.glora import GLoRA as GLoRA
from peftfx.methods.gralora import GraLoRA as GraLoRA
from peftfx.methods.hira import HiRA as HiRA
from peftfx.methods.hra import HRA as HRA
from peftfx.methods.ia3 import IA3 as IA3
from peftfx.methods.lily import Lily as Lily
from peftfx.methods.llama_adapter import LlamaAdapter as LlamaAdapter
from peftfx.methods.ln_tuning import LNTuning as LNTuning
from peftfx.methods.loha import LoHa as LoHa
from peftfx.methods.lokr import LoKr as LoKr
from peftfx.methods.lora import LoRA as LoRA
from peftfx.methods.miss import MiSS as MiSS
from peftfx.methods.multitask_prompt_tuning import MultitaskPromptTuning as MultitaskPromptTuning
from peftfx.methods.oft import OFT as OFT
from peftfx.methods.osf import OSF as OSF
from peftfx.methods.p_tuning import PTuning as PTuning
from peftfx.methods.peanut import PEANuT as PEANuT
from peftfx.methods.poly import Poly as Poly
from peftfx.methods.prefix_tuning import PrefixTuning as PrefixTuning
from peftfx.methods.prompt_tuning import PromptTuning as PromptTuning
from peftfx.methods.psoft import PSOFT as PSOFT
from peftfx.methods.pvera import PVeRA as PVeRA
from peftfx.methods.randlora import RandLoRA as RandLoRA
from peftfx.methods.road import RoAd as RoAd
from peftfx.methods.shira import SHiRA as SHiRA
from peftfx.methods.supertuning import SuperTuning as SuperTuning
from peftfx.methods.tinylora import TinyLoRA as TinyLoRA
from peftfx.methods.trainable_tokens import TrainableTokens as TrainableTokens
from peftfx.methods.unilora import UniLoRA as UniLoRA
from peftfx.methods.vblora import VBLoRA as VBLoRA
from peftfx.methods.vera import VeRA as VeRA
from peftfx.methods.waveft import WaveFT as WaveFT
from peftfx.model.adapted import AdaptedModel as AdaptedModel
from peftfx.model.api import inspect as inspect
from peftfx.model.api import load as load
from peftfx.model.api import plan as plan
from peftfx.model.api import transform as transform
from peftfx.model.state_functions import get_peft_model_state_dict as get_peft_model_state_dict
from peftfx.model.state_functions import hotswap_adapter as hotswap_adapter
from peftfx.model.state_functions import set_peft_model_state_dict as set_peft_model_state_dict
from peftfx.model.trainers.callbacks import AdapterInCheckpoints as AdapterInCheckpoints
from peftfx.model.trainers.callbacks import MemoryInLogs as MemoryInLogs
from peftfx.model.trainers.callbacks import RankAllocation as RankAllocation
from peftfx.patterns.pattern import Pattern as Pattern
from peftfx.patterns.pattern import pattern as pattern
from peftfx.sites.site import Site as Site
from peftfx.sites.sites import Sites as Sites
from peftfx.version import __version__ as __version__
from peftfx.views.capture import capture as capture

__all__ = [
    "AdaLoRA",
    "AdaMSS",
    "AdaptedModel",
    "AdapterInCheckpoints",
    "BEFT",
    "BOFT",
    "BitFit",
    "C3A",
    "CPT",
    "Cartridge",
    "DEFT",
    "DeLoRA",
    "ExportOptions",
    "FRoD",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "Graph",
    "HRA",
    "HiRA",
    "IA3",
    "LNTuning",
    "Lily",
    "LlamaAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "MemoryInLogs",
    "MiSS",
    "MultitaskPromptTuning",
    "OFT",
    "OSF",
    "PEANuT",
    "PSOFT",
    "PTuning",
    "PVeRA",
    "Pattern",
    "PatternMethod",
    "PeftfxError",
    "Poly",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "RankAllocation",
    "RoAd",
    "SHiRA",
    "Site",
    "Sites",
    "SuperTuning",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "__version__",
    "capture",
    "export_adapter",
    "export_onnx",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inspect",
    "load",
    "pattern",
    "plan",
    "register",
    "runtime",
    "set_peft_model_state_dict",
    "testing",
    "transform",
]
