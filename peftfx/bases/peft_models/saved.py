"""The adapters of a HF PEFT model as PEFT saves them, and what it leaves out of its files."""

from __future__ import annotations

import json
import re
import warnings
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
    folder = directory if name == "default" else directory / name
    _order_patterns(folder / _CONFIG, model.peft_config[name])
    return folder


def _order_patterns(file: Path, config: Any) -> None:
    """Give the patterns of a written config their order in memory: of keys that match one layer, the first counts."""
    written = json.loads(file.read_text(encoding="utf-8"))
    for field, value in written.items():
        own = getattr(config, field, None)
        if isinstance(own, dict) and isinstance(value, dict) and own.keys() == value.keys():
            written[field] = {key: value[key] for key in own}
    file.write_text(json.dumps(written), encoding="utf-8")


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
