"""trained_tokens: the rows of embeddings that a rule trains beside what it does elsewhere, as HF PEFT names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.override import Override, rows_of, ties_embeddings
from peftfx.contract.sequence import embedding_path
from peftfx.errors import PeftfxError, nearest

Tokens = Sequence[int] | Mapping[str, Sequence[int]] | None


def trained_tokens(base: nn.Module, given: Tokens, saved: Iterable[str] = ()) -> list[Override]:
    """The rows that these tokens are, of the token embedding or of the embeddings that are named.

    A head that the model says is tied reads them too, unless tokens of its own are named for it.

    Raises:
        PeftfxError: a name that no module ends with, or a module that is trained whole.
    """
    if not given:
        return []
    named = _named(base, given if isinstance(given, Mapping) else {_embedding(base): given})
    if both := set(named) & set(saved):
        hint = "name it in one of them"
        raise PeftfxError("this embedding is in modules_to_save and in trainable_token_indices", min(both), hint)
    tensors: dict[int, dict[str, tuple[int, ...]]] = {}
    for path, rows in named.items():
        tensors.setdefault(id(base.get_submodule(path).weight), {})[path] = rows
    found = []
    for tied in tensors.values():
        if len(set(tied.values())) == 1 and ties_embeddings(base):
            path, rows = next(iter(tied.items()))
            found.append(rows_of(path, rows, f"{path}.weight"))
        else:
            found += [rows_of(path, rows, "weight", path) for path, rows in tied.items()]
    return found


def _embedding(base: nn.Module) -> str:
    """The path of the token embedding."""
    path = embedding_path(base)
    if path is None:
        hint = "name the embedding: {'path': [...]}"
        raise PeftfxError("the model does not say which module embeds its tokens", "trainable_token_indices", hint)
    return path


def _named(base: nn.Module, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The tokens by the paths of the modules that end with each name."""
    paths = [path for path, module in own_modules(base) if isinstance(getattr(module, "weight", None), nn.Parameter)]
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in given.items():
        matches = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not matches:
            hint = nearest(name, paths) or "`peftfx inspect` lists the modules"
            raise PeftfxError("no module with a weight has this name", name, hint)
        found |= dict.fromkeys(matches, tuple(rows))
    return found
