"""Vocabularies of other sizes: a base is resized to the tokens of an adapter's file, and what does not fit is told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from peftfx.adapters.files.names import WRAPPERS
from peftfx.bases.embeddings import input_embeddings, output_embeddings
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError, shown, warn
from peftfx.graph.lazy_weights import Stored
from peftfx.rules.peft_files import Weights


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
        named = {key: _table_in(file, names) for key, names in tables.items()}
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
    name = _table_in(weights, names)
    found = weights.shapes[name][0] if name else len(own)
    if found == len(own):
        return ""
    what = f"the file's embeddings have {found} tokens, and the base's have {len(own)}"
    return f"{what}: resize the base first (base.resize_token_embeddings({found})), as it was for the training"


def _table_paths(base: nn.Module) -> list[str]:
    """Return the paths of the modules that hold the base's embeddings of the input and of the output."""
    tables = (input_embeddings(base), output_embeddings(base))
    return [path for path, module in own_modules(base) if module in tables]


def _names_in_files(base: nn.Module, paths: Iterable[str]) -> dict[int, list[str]]:
    """Return the names that the weights at these paths have in files, by the ids of the weights."""
    tables: dict[int, list[str]] = {}
    for path in paths:
        if isinstance(weight := getattr(base.get_submodule(path), "weight", None), Tensor):
            tables.setdefault(id(weight), []).extend(f"{path}{copy}weight" for copy in (*WRAPPERS, "."))
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


def _table_in(weights: Weights, names: Iterable[str]) -> str:
    """Return the first of these names under which a file has a table of rows; empty if it has none."""
    return next((name for name in names if len(weights.shapes.get(name, ())) == 2), "")
