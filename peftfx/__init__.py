"""peftfx compiles PEFT adapters to ONNX models: a file per method, sites read from the graph, a model per export."""

from __future__ import annotations

import functools
import importlib
import os

from peftfx.version import __version__ as __version__

# Without the links to `passes` and `export` (an installation, or a clone without symbolic links), look in the parent.
if not os.path.isdir(os.path.join(__path__[0], "passes")):
    __path__.append(os.path.dirname(__path__[0]))

# Names are imported when first used: torch and transformers take seconds, and `peftfx --help` needs neither.
_HOME = {
    "AdaptedModel": "peftfx.model.adapted",
    "AdapterInCheckpoints": "peftfx.model.trainers.callbacks",
    "ExportOptions": "peftfx.export_options.export",
    "Graph": "peftfx.graph.graph",
    "MemoryInLogs": "peftfx.model.trainers.callbacks",
    "Pattern": "peftfx.patterns.pattern",
    "PatternMethod": "peftfx.contract.pattern",
    "PeftfxError": "peftfx.errors",
    "RankAllocation": "peftfx.model.trainers.callbacks",
    "Site": "peftfx.sites.site",
    "Sites": "peftfx.sites.sites",
    "capture": "peftfx.views.capture",
    "export_adapter": "peftfx.export.slots.adapter_export",
    "export_onnx": "peftfx.export.onnx_directory",
    "get_peft_model_state_dict": "peftfx.model.state_functions",
    "hotswap_adapter": "peftfx.model.state_functions",
    "inspect": "peftfx.model.api",
    "load": "peftfx.model.api",
    "pattern": "peftfx.patterns.pattern",
    "plan": "peftfx.model.api",
    "register": "peftfx.methods",
    "runtime": "",  # a module
    "set_peft_model_state_dict": "peftfx.model.state_functions",
    "testing": "",
    "transform": "peftfx.model.api",
}


@functools.cache
def _homes() -> dict[str, str]:
    """Return the module of each public name: of the names in `_HOME`, and of the methods found in their folder."""
    from peftfx.discovery import method_classes

    return {**_HOME, **method_classes()}


def __getattr__(name: str) -> object:
    if name == "__all__":
        return ["__version__", *sorted(_homes())]
    home = _HOME.get(name)
    if home is None and name[:1].isupper():  # a method: only its own file names it
        home = _homes().get(name)
    if home is None:
        raise AttributeError(f"module 'peftfx' has no attribute {name!r}{_for_pefts_name(name)}")
    if not home:
        return importlib.import_module(f"peftfx.{name}")
    # Kept in this module: an import of a submodule of the same name would else replace the function by the module.
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def _for_pefts_name(name: str) -> str:
    """Return what a name of HF PEFT is here, for the message about it; empty for other names."""
    told = {"get_peft_model": "peftfx.transform does that", "PeftModel": "peftfx.load is its from_pretrained"}
    if name.endswith("Config"):
        return ": peftfx.transform takes the configs of peft as they are"
    return f": {told[name]}" if name in told else ""


def __dir__() -> list[str]:
    return ["__version__", *sorted(_homes())]
