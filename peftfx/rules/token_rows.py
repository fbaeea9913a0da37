"""The rows of embeddings that a rule trains besides its own parameters (HF PEFT's `trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from peftfx.bases.embeddings import embedding_path
from peftfx.bases.guests import own_modules
from peftfx.contract.override import Override, rows_are_trained, rows_of, ties_embeddings
from peftfx.contract.placed import Placed
from peftfx.contract.placement import owner_of, site_tensors
from peftfx.errors import PeftfxError, nearest
from peftfx.sites.expression import ends_with

Tokens = Sequence[int] | Mapping[str, Sequence[int]] | None


def trained_tokens(base: nn.Module, given: Tokens, saved: Iterable[str] = ()) -> list[Override]:
    """Return overrides for the rows of these tokens, in the token embedding or in the named embeddings.

    If the model's embedding is named, modules that the model declares as tied to it read the trained rows too, unless
    the rule names other tokens for them. Otherwise each named module has rows of its own, as in HF PEFT, such as the
    `embed_tokens` of T5's two stacks.

    Args:
        base: the base.
        given: the tokens of the token embedding; or, for each name, those of the modules whose paths end with the name.
        saved: the paths of modules that are trained whole (`modules_to_save`).

    Raises:
        PeftfxError: no module's path ends with a name, or a named module is in `saved`.
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
        if len(set(tied.values())) == 1 and embedding_path(base) in tied and ties_embeddings(base):
            path, rows = next(iter(tied.items()))
            found.append(rows_of(path, rows, f"{path}.weight"))
        else:
            found += [rows_of(path, rows, "weight", path) for path, rows in tied.items()]
    return found


def refuse_beside_rows(base: nn.Module, placed: Sequence[Placed]) -> None:
    """Refuse methods at weights that read trained rows: the embedding's own, or those of a head that is tied to it."""
    rows = [override for rule in placed for override in rule.overrides if override.rows]
    for placement in (p for rule in placed for p in rule.placements.weights) if rows else ():
        tensor = site_tensors(base, placement.site)[0]
        for override in rows:
            owner, leaf = owner_of(base.get_submodule(override.module), override.name)
            within = f"{override.module}." if override.module else ""
            if getattr(owner, leaf) is tensor and f"{placement.site.path}.".startswith(within):
                raise rows_are_trained(placement.site.path)


def _embedding(base: nn.Module) -> str:
    """Return the path of the token embedding."""
    path = embedding_path(base)
    if path is None:
        hint = "name the embedding: {'path': [...]}"
        raise PeftfxError("the model does not say which module embeds its tokens", "trainable_token_indices", hint)
    return path


def _named(base: nn.Module, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the tokens by module path, in the modules' order, for the modules whose paths end with a given name.

    A file's names are sorted. An optimizer's saved state goes by the order of parameters, so names in another order
    must not change it.
    """
    paths = [path for path, module in own_modules(base) if isinstance(getattr(module, "weight", None), nn.Parameter)]
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in given.items():
        matches = [path for path in paths if ends_with(path, name)]
        if not matches:
            hint = nearest(name, paths) or "`peftfx inspect` lists the modules"
            raise PeftfxError("no module with a weight has this name", name, hint)
        found |= dict.fromkeys(matches, tuple(rows))
    return {path: found[path] for path in paths if path in found}
