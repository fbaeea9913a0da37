"""Take over a HF PEFT model: its base without PEFT's layers, and its adapters as PEFT saves them.

`peft` is not imported. Its models are recognised by their class, and used by their own methods.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftfx.errors import PeftfxError, first_line, warn

_CONFIG = "adapter_config.json"
_START = "init_lora_weights"
#: Starts that moved the base's weights when the adapter was made. The moved base is in memory alone.
_MOVES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


#: The option by which PEFT's files leave trained values out.
_SHORT = "save_only_topk_weights"
#: The names of children of PEFT's layers that are the base's own modules.
_HOLDS = ("base_layer", "original_module", "token_adapter", "model")


def is_peft_model(model: object) -> bool:
    """Say whether a model is a `peft.PeftModel` or `peft.PeftMixedModel`."""
    return any(cls.__name__ in ("PeftModel", "PeftMixedModel") and _is_pefts(cls) for cls in type(model).__mro__)


def carries_peft(model: nn.Module) -> bool:
    """Say whether a model that is no `peft.PeftModel` has layers of PEFT, as after diffusers' `add_adapter`."""
    return any(_is_pefts(type(module)) for module in model.modules())


def plain_base(model: Any) -> nn.Module:
    """Return the base of a HF PEFT model: the same tensors, in copied modules without PEFT's layers.

    Raises:
        PeftfxError: adapters are merged into the base, or a layer of PEFT holds no known module of the base.
    """
    base: nn.Module = model.get_base_model()
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers(), *_states(base))}
    inner: dict[int, nn.Module] = {}
    _find_layers(base, "", inner)
    for number, module in reversed(inner.items()):  # a layer inside another, such as an attention's, comes first
        while id(module) in inner:  # one PEFT layer may be around another
            module = inner[id(module)]
        memo[number] = copy.deepcopy(module, memo)
    return copy.deepcopy(base, memo)


def _states(base: nn.Module) -> Iterator[object]:
    """Find the objects that layers keep beside a weight of a class of its own: layers that share the weight share them.

    In its first call bitsandbytes' int8 layer moves the scales out of the weight into such an object. A second layer
    with an object of its own would find them no more.
    """
    for module in base.modules():
        if any(type(p) is not nn.Parameter and vars(p) for p in module._parameters.values() if p is not None):
            own = (value for name, value in vars(module).items() if not name.startswith("_"))
            yield from (v for v in own if hasattr(v, "__dict__") and not callable(v))


def _find_layers(module: nn.Module, path: str, found: dict[int, nn.Module]) -> None:
    """Find PEFT's layers that replace modules of the base, by their ids, and the replaced modules."""
    if getattr(module, "merged_adapters", None):
        what = f"adapters are merged into the base's weights: {', '.join(module.merged_adapters)}"  # type: ignore[arg-type]
        raise PeftfxError(what, path, "call unmerge_adapter() of the PeftModel first")
    if _is_pefts(type(module)):
        found[id(module)] = _inside(module, path)
        _find_layers(found[id(module)], path, found)
        return
    for name, child in module.named_children():
        _find_layers(child, f"{path}.{name}".removeprefix("."), found)


def _inside(module: nn.Module, path: str) -> nn.Module:
    """Return the base's own module inside a PEFT layer."""
    held = next((own for name in _HOLDS if (own := module._modules.get(name)) is not None), None)
    if held is None:
        hint = "save the adapter with save_pretrained, and load its directory"
        raise PeftfxError(f"peftfx does not know this layer of PEFT: {type(module).__name__}", path, hint)
    return held


@dataclass(frozen=True)
class Taken:
    """An adapter as HF PEFT writes it.

    Attributes:
        folder: the folder with its files.
        start: the start that moved the base's weights, such as `pissa`; empty if none did. The files in `folder` do not
            name it, because the base in memory has been moved already.
        frozen: the tensors that do not train, although others of the adapter do, by their names in the file without
            `.weight`.
        whole: a folder with all that the adapter trains, if the files in `folder` leave some of it out.
    """

    folder: Path
    start: str
    frozen: tuple[str, ...]
    whole: Path | None


def save_peft_adapters(model: Any, directory: Path) -> dict[str, Taken]:
    """Let a HF PEFT model write its adapters, and return what it wrote by their names.

    Raises:
        PeftfxError: PEFT cannot write an adapter, or the model is a `PeftMixedModel`.
    """
    if any(cls.__name__ == "PeftMixedModel" for cls in type(model).__mro__):
        what = "peft writes no files of a model with adapters of several methods, from which they are taken over"
        raise PeftfxError(what, "PeftMixedModel", "make each adapter a PeftModel, save it, and load it by peftfx.load")
    found: dict[str, Taken] = {}
    for name, config in model.peft_config.items():
        folder, whole = _save(model, name, directory / str(len(found))), None
        if getattr(config, _SHORT, False):
            setattr(config, _SHORT, False)
            try:
                whole = _save(model, name, directory / f"{len(found)}-whole")
            finally:
                setattr(config, _SHORT, True)
        found[name] = Taken(folder, _take_start(folder / _CONFIG), _frozen(model, name), whole)
        if left := _left_out(config):
            warn(f"adapter {name!r}: {left}")
    return found


def _save(model: Any, name: str, directory: Path) -> Path:
    """Let a HF PEFT model write one adapter, and return the folder with its files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(directory), selected_adapters=[name], save_embedding_layers=False)
    except Exception as error:
        what = f"peft cannot write this {model.peft_config[name].peft_type} adapter: {first_line(error)}"
        raise PeftfxError(what, name, "call delete_adapter(NAME) of the PeftModel first") from error
    return directory if name == "default" else directory / name


def _frozen(model: nn.Module, adapter: str) -> tuple[str, ...]:
    """Return the tensors of an adapter that do not train, as `Taken.frozen`; none if no tensor trains."""
    part = f".{adapter}."
    own = [(f"{name}.", p.requires_grad) for name, p in model.named_parameters() if part in f"{name}."]
    if not any(trains for _, trains in own):
        return ()
    names = (".".join(name.rpartition(part)[::2]) for name, trains in own if not trains)
    return tuple(re.sub(r"\.modules_to_save(?=\.)|(\.weight)?\.$", "", name) for name in names)


def _take_start(file: Path) -> str:
    """Take a start that moved the base out of a config, and return it: the base in memory is used as it is."""
    config = json.loads(file.read_text(encoding="utf-8"))
    start = config.get(_START)
    if not isinstance(start, str) or not _MOVES_BASE.match(start):
        return ""
    file.write_text(json.dumps(config | {_START: True}), encoding="utf-8")
    return start


def _left_out(config: Any) -> str:
    """Return what HF PEFT leaves out of an adapter's file, if it trains that."""
    if getattr(config, "encoder_reparameterization_type", None) or getattr(config, "prefix_projection", False):
        return "it is taken over as peft saves it, without the encoder of its prompts, which is not trained further"
    return ""


def active_adapters(model: Any) -> list[str]:
    """Return the active adapters of a HF PEFT model; none if adapters are disabled."""
    found = model.active_adapters
    names: list[str] = list(found() if callable(found) else found)
    layers = [m for m in model.modules() if hasattr(m, "disable_adapters") and hasattr(m, "merged_adapters")]
    return [] if layers and all(m.disable_adapters for m in layers) else names


def _is_pefts(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "peft"
