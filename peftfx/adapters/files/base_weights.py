"""Tensors of the base in a HF PEFT file: `save_embedding_layers`, and the base layers of adapted embeddings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.files.names import override_name, row_layers
from peftfx.bases.guests import own_modules, own_parameters
from peftfx.contract.override import SAVED, Override
from peftfx.contract.placement import Placement
from peftfx.contract.sequence import input_embeddings
from peftfx.errors import PeftfxError, shown, warn
from peftfx.graph.lazy_weights import Stored
from peftfx.rules.peft_files import Weights

_ROWS = ".token_adapter.base_layer."
_LAYER = ".base_layer."
_COPY = ".original_module."


def replaced_weights(
    base: nn.Module,
    weights: Weights,
    placements: Sequence[Placement],
    overrides: Iterable[Override],
    own_names: Collection[str] = (),
) -> list[Override]:
    """Return the base's tensors that the file has with other values, as overrides that are not trained.

    The file has such a tensor under the base's own name, as the `base_layer` of an adapted module, or as what a saved
    module was before its training. HF PEFT replaces the base's tensor when it loads the file: after a vocabulary was
    resized, the file has the embeddings. Tensors that equal the base's are dropped from `weights.names`. The others
    become overrides that are not trained, of each module by itself if another module has a trained copy of the tensor.
    `own_names` are names that look like the base's but are the method's own: BitFit's biases are its parameters.

    Raises:
        PeftfxError: tied tensors differ in the file.
    """
    own = dict(own_parameters(base, remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    layers = {p.site.path for p in placements}
    tensors = {id(own.get(f"{path}.weight")) for path in layers} - {id(None)}
    adapted = layers | {name.removesuffix(".weight") for name, tensor in own.items() if id(tensor) in tensors}
    overrides = list(overrides)
    trained = {override.key.removeprefix(f"{SAVED}.") for override in overrides}
    everywhere = {id(own[o.name]) for o in overrides if not o.module and not o.rows and o.name in own}
    named = {key: path for key in weights.names if (path := _base_name(key, own, adapted)) and key not in own_names}
    keys = {id(own[path]): key for key, path in named.items() if path in trained and _COPY not in key}
    copied = {id(own[p]) for p in trained if p in own}
    untrained: dict[int, list[str]] = {}
    for name in (name for name in own if name not in trained):
        untrained.setdefault(id(own[name]), []).append(name)
    found: dict[int, tuple[str, list[Override]]] = {}
    for key, path in named.items():
        rest = untrained.get(id(own[path]), [])
        if path in trained and (_COPY not in key or not rest or id(own[path]) in everywhere):
            continue  # the adapter's own; or what its copy was made of, and the base reads the copy everywhere
        if path not in trained and _COPY in key:
            continue
        if id(own[path]) in everywhere:  # another name of a tensor that is trained: with bias="all", of a tied bias
            _refuse_apart(weights, keys.get(id(own[path]), key), key)
            weights.names.pop(key)
            continue
        if not _differs(weights, key, own[path]):
            weights.names.pop(key)
            continue
        if id(own[path]) in found:
            _refuse_apart(weights, found[id(own[path])][0], key)
            if id(own[path]) not in copied:
                weights.names.pop(key)
        elif id(own[path]) in copied:  # another module has a copy of its own
            found[id(own[path])] = key, [_within(name) for name in rest]
            around = adapted | set(row_layers(overrides))
            weights.repeat(key, [override_name(override, around) for override in found[id(own[path])][1]])
        else:
            found[id(own[path])] = key, [Override(f"{SAVED}.{path}", "", path, trained=False)]
    return [override for _, made in found.values() for override in made]


def _within(name: str) -> Override:
    """Return an untrained override of one of a tensor's names, for the module that has it under this name."""
    module, _, leaf = name.rpartition(".")
    return Override(f"{SAVED}.{name}", module, leaf, trained=False)


def _refuse_apart(weights: Weights, before: str, key: str) -> None:
    """Refuse two tensors of a file that differ, and that are one tensor in the model."""
    if not torch.equal(weights[before], weights[key]):
        hint = "untie the base's embeddings (tie_word_embeddings=False), and load it on that"
        raise PeftfxError(f"this and {before} are one tensor in the model, but they differ in the file", key, hint)


def resize_vocabulary(base: nn.Module, files: Iterable[Weights]) -> None:
    """Resize the base's embedding to the most tokens that an adapter's file has, if that is more.

    The rows of the new tokens are the file's: those of the base that the adapter was trained on.

    Raises:
        PeftfxError: a file has no rows of the output for the new tokens, and the output is not tied to the embedding.
    """
    paths = _table_paths(base)
    own = getattr(input_embeddings(base), "weight", None)
    tables = _names_in_files(base, paths)
    if not isinstance(own, Tensor) or id(own) not in tables:
        return
    rows, found = len(own), dict[str, Tensor]()
    for file in files:
        named = {key: next((n for n in names if n in file.shapes), "") for key, names in tables.items()}
        sizes = {key: file.shapes[name][0] if name else 0 for key, name in named.items()}
        if sizes[id(own)] <= rows:
            continue
        rows = sizes[id(own)]
        if set(sizes.values()) != {rows}:
            what = f"{rows} tokens in the file and {len(own)} in the base, and the new ones have no rows of the output"
            hint = "save the base that has the new tokens (PeftModel.unload().save_pretrained(DIR)), and give that"
            raise PeftfxError(what, str(file.path), hint)
        found = {path: file[named[id(base.get_submodule(path).weight)]] for path in paths}
    if rows > len(own):
        before = len(own)
        _read_tables([base.get_submodule(path) for path in paths])
        base.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
        for path, value in found.items():
            base.get_submodule(path).weight.data[before:rows].copy_(value[before:rows])  # type: ignore[index]


def other_tokens(base: nn.Module, weights: Weights) -> str:
    """Return what to do about a file whose embeddings have another number of tokens than the base's; empty if none."""
    embedding = input_embeddings(base)
    if not isinstance(embedding, nn.Embedding):
        return ""
    own = embedding.weight
    names = _names_in_files(base, _table_paths(base)).get(id(own), [])
    found = next((weights.shapes[name][0] for name in names if name in weights.shapes), len(own))
    if found == len(own):
        return ""
    what = f"the file's embeddings have {found} tokens, and the base's have {len(own)}"
    return f"{what}: resize the base first (base.resize_token_embeddings({found})), as it was for the training"


def _table_paths(base: nn.Module) -> list[str]:
    """Return the paths of the modules that hold the base's embeddings of the input and of the output."""
    tables = (input_embeddings(base), getattr(base, "get_output_embeddings", lambda: None)())
    return [path for path, module in own_modules(base) if module in tables]


def _names_in_files(base: nn.Module, paths: Iterable[str]) -> dict[int, list[str]]:
    """Return the names that the weights at these paths have in files, by the ids of the weights."""
    tables: dict[int, list[str]] = {}
    for path in paths:
        if isinstance(weight := getattr(base.get_submodule(path), "weight", None), Tensor):
            tables.setdefault(id(weight), []).extend(f"{path}{copy}weight" for copy in (_ROWS, _COPY, _LAYER, "."))
    return tables


def _read_tables(modules: Sequence[nn.Module]) -> None:
    """Give these modules weights that can be written, where theirs stay in the base's files."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        weight = module.weight
        if isinstance(weight, Stored):
            read = nn.Parameter(weight.source.to(weight.dtype, copy=True), requires_grad=weight.requires_grad)
            module.weight = made.setdefault(id(weight), read)


def tell_tokens_without_rows(base: nn.Module, directories: Iterable[Path]) -> None:
    """Warn of tokens that the tokenizer of an adapter's directory adds, and that the embedding has no rows for."""
    rows = len(getattr(input_embeddings(base), "weight", ()))
    for path in (directory / "tokenizer.json" for directory in directories if rows):
        beyond = [token for token in _added_tokens(path) if token[0] >= rows]
        if beyond:
            token, content = beyond[0]
            warn(
                f"{path}: the tokenizer adds {shown(content)}, the token {token}, and the embedding has {rows} rows: "
                "texts with it fail. Save the adapter again, from the model with the new tokens, with "
                "save_embedding_layers=True"
            )


def _added_tokens(path: Path) -> list[tuple[int, object]]:
    """Return the tokens that a tokenizer's file adds to its vocabulary; none if there is no such file, or another."""
    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        return [(int(token["id"]), token.get("content")) for token in added]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # whoever reads texts tells it
        return []


def _base_name(key: str, own: Mapping[str, Tensor], adapted: set[str]) -> str | None:
    """Return the name of the base's tensor that a key of a file stands for, or None."""
    if key in own:
        return key
    for mark in (_ROWS, _COPY, _LAYER):
        path, found, leaf = key.partition(mark)
        name = f"{path}.{leaf}"
        if found and name in own and (mark != _LAYER or path in adapted):
            return name
    return None


def _differs(weights: Weights, key: str, tensor: Tensor) -> bool:
    """Return whether the file's tensor is not equal to the base's tensor; another shape is a difference too."""
    if weights.shapes[key] != tuple(tensor.shape):
        return True
    return tensor.is_meta or not torch.equal(weights[key].to(tensor), tensor)
