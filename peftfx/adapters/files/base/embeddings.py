"""Embeddings of a base in the files of an adapter, where the base in memory has other tokens than the base's files."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.names import name_of_base
from peftfx.bases.config_fields import vocabulary_of
from peftfx.bases.embeddings import input_embeddings, output_embeddings
from peftfx.bases.guests import own_modules, own_parameters
from peftfx.errors import PeftfxError, warn
from peftfx.files import is_file, is_folder
from peftfx.options import AUTO
from peftfx.sharding.parts import is_part

_LAYER = ".base_layer"


def embeddings_beside(base: nn.Module, adapter: Adapter, asked: str | bool, where: str) -> dict[str, Tensor]:
    """Return the base's embeddings that an adapter's file is to have, by their names in HF PEFT's file.

    As in HF PEFT, a file has those of the input and of the output if the vocabulary was resized after the base was
    loaded: the base's own files have no rows for the new tokens.

    Args:
        base: the base.
        adapter: the adapter that is saved.
        asked: whether the file is to have them; `auto` says so for a base that was resized.
        where: the directory that is written, for the warning.

    Raises:
        PeftfxError: they are asked for, and the base has none, or the file cannot have them.
    """
    before = _tokens_in_files(base) if asked == AUTO else None
    resized = before is not None and before != vocabulary_of(getattr(base, "config", None))
    if not (resized or asked is True):
        return {}
    tables = dict(_tables(base))
    obstacle = _obstacle(base, adapter, tables.values())
    if not tables:
        what = "the base has no embeddings that could be saved with the adapter"
        raise PeftfxError(what, "save_embedding_layers", "leave save_embedding_layers out")
    if obstacle:
        what = f"the adapter's file cannot have the base's embeddings: {obstacle}"
        if asked is True:
            raise PeftfxError(what, "save_embedding_layers", "save the base itself, too: base.save_pretrained(DIR)")
        warn(
            f"{where}: the base was resized from {before} tokens after it was loaded, and {what}. Save the base "
            "itself, too (get_base_model().save_pretrained(DIR)), and load the adapter on that"
        )
        return {}
    whole = [override for override in adapter.overrides if not override.rows]
    named = [o for override in whole if override.module for o in override.by_each_name()]
    parts = {f"{o.module}.{o.name}": f"{o.module}.original_module.{o.name}" for o in named}
    copied = {id(_parameter(base, override.name)) for override in whole if not override.module}
    layers = _layers(base, adapter)
    found = {}
    for name, tensor in tables.items():
        path, _, leaf = name.rpartition(".")
        if id(tensor) in copied:
            continue
        if name not in parts:
            found[f"{path}{layers.get(path, layers.get(id(tensor), ''))}.{leaf}"] = tensor
        elif any(p is tensor and other not in parts for other, p in own_parameters(base, remove_duplicate=False)):
            found[parts[name]] = tensor
    if resized and found:
        warn(f"{where}: the base's embeddings are saved, too, for it was resized from {before} tokens after loading")
    return found


def _tables(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules = [module for module in (input_embeddings(base), output_embeddings(base)) if module is not None]
    for path, module in own_modules(base):
        if any(module is other for other in modules):
            yield from ((f"{path}.{name}", p) for name, p in module._parameters.items() if p is not None)


def _layers(base: nn.Module, adapter: Adapter) -> dict[object, str]:
    """Return what HF PEFT has around modules, as in its files, by their paths, or by the ids of tied tensors."""
    found: dict[object, str] = {p.known_as or p.site.path: _LAYER for p in adapter.placements.weights}
    overrides = [(o, f".token_adapter{_LAYER}") for rule in adapter.placed for o in rule.overrides]
    for override, around in (*overrides, *((o, _LAYER) for p in adapter.placements for o in p.copies)):
        if override.rows:
            found[override.module or id(_parameter(base, override.name))] = around
    return found


def _obstacle(base: nn.Module, adapter: Adapter, tables: Collection[Tensor]) -> str:
    """Return why the file of an adapter cannot have the base's embeddings; empty if it can."""
    if adapter.placements.prompts:
        return "a prompt's file has the prompt alone"
    if any(map(is_part, tables)):
        return "they are sharded over processes"
    if any(tensor.is_meta for tensor in tables):
        return "their values are not in memory"
    held = set(map(id, tables))
    for p in adapter.placements.weights:
        if id(_parameter(base, f"{p.site.path}.weight")) in held and p.method.past_start(adapter.params(p)):
            return f"the adapter started as a part of the weight of {p.site.path}, and HF PEFT has it without that part"
    return ""


def _parameter(base: nn.Module, name: str) -> object:
    return functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), base)  # type: ignore[arg-type, return-value]


def _tokens_in_files(base: nn.Module) -> object:
    """Return how many tokens the files have that a base was loaded from; None if that is not known on this machine."""
    name, config = name_of_base(base), getattr(base, "config", None)
    read = getattr(type(config), "from_pretrained", None)
    if name is None or read is None or vocabulary_of(config) is None:
        return None
    if is_folder(Path(name)) and not is_file(Path(name) / "config.json"):
        return None  # transformers reads its defaults there
    try:
        return vocabulary_of(read(os.fspath(name), local_files_only=True))
    except Exception:  # whatever is wrong with those files, this adapter is not to blame
        return None
