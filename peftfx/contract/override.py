"""Overrides: tensors of the base that an adapter replaces by copies it trains, and the methods that do nothing else.

Nothing is computed beside the base: within the module, the graph reads the copies. That is exact whatever the module
does with its tensors. Merged, a copy is the tensor.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method, has_parameter
from peftfx.contract.sequence import embedding_path
from peftfx.graph.places import has_module
from peftfx.sites.site import NORM, WEIGHT_KINDS, Site
from peftfx.sites.target import Where, explain

SAVED = "saved"  #: the folder of an adapter in which it keeps copies of the base's own tensors
TOKENS = "trainable_tokens_delta"  #: HF PEFT's name for the rows of an embedding that an adapter trains


@dataclass(frozen=True)
class Override:
    """A tensor of the base that an adapter replaces by one of its own, or rows of it, within one module.

    Attributes:
        key: where the adapter keeps its tensor, a dotted name.
        module: the module path within which uses of the base's tensor are replaced.
        name: the tensor's name, relative to the module.
        rows: which of its rows the adapter's tensor is; empty for the whole.
        trained: whether the adapter trains it; one that a file brought is as it is.
    """

    key: str
    module: str
    name: str
    rows: tuple[int, ...] = ()
    trained: bool = True

    @property
    def stands(self) -> bool:
        """Whether it is counted as the base's own, as HF PEFT counts a trained bias; copies and rows come on top."""
        return self.trained and not self.module and not self.rows

    @property
    def indices(self) -> str:
        """Where the adapter keeps the rows' indices."""
        return f"{self.key.rpartition('.')[0]}.token_indices"


class OverrideMethod(Method):
    """A method that trains copies of what the modules that it targets hold."""

    kinds: ClassVar[frozenset[str]] = frozenset({*WEIGHT_KINDS, NORM})

    def needs_place(self, module: nn.Module) -> bool:
        return has_parameter(module, axes=1)

    @abstractmethod
    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        """The tensors that it copies, of all that the site's module holds, by their names there.

        Parameters are trained; buffers, as a batch norm's averages, go with them.
        """

    @abstractmethod
    def suffix(self, name: str) -> str:
        """A copy's suffix in a HF PEFT checkpoint."""


def copies_of(base: nn.Module, method: OverrideMethod, site: Site) -> tuple[Override, ...]:
    """The tensors that a method trains copies of at a site: of its module, or the bare parameter that it is.

    Rows of the model's embedding are those of the tensor wherever the base uses it, in a tied head too: see
    `tied_embedding`.
    """
    try:
        module, own = site.path, base.get_submodule(site.path).state_dict(keep_vars=True)
        names = {name: name for name in own if "." not in name}
    except AttributeError:
        module, _, name = site.weight.partition(".")[2].rpartition(".")
        names = {"weight": name}
    copied = method.copied(site, list(names))
    if rows := method.rows():
        if not tied_embedding(base, method, site):
            return tuple(rows_of(site.path, rows, names[n], module) for n in copied)
        return tuple(rows_of(site.path, rows, f"{module}.{names[n]}".removeprefix(".")) for n in copied)
    return tuple(Override(f"{SAVED}.{site.path}.{n}", module, names[n]) for n in copied)


def tied_embedding(base: nn.Module, method: Method, site: Site) -> str:
    """HF PEFT's path of the model's tied embedding, where a method trains rows of it at this site; empty elsewhere.

    As in HF PEFT: rows of another module that has the same tensor, of T5's `encoder.embed_tokens`, are its alone, if
    that is named and not the model's embedding (`shared`).
    """
    path = embedding_path(base) if method.rows() and site.kind == "embedding" and ties_embeddings(base) else None
    if path is None or not has_module(base, site.path):
        return ""
    own, tied = (getattr(base.get_submodule(p), "weight", None) for p in (site.path, path))
    if own is None or own is not tied:
        return ""
    if method.target_modules is None:
        return path
    where = Where(target_modules=method.target_modules, exclude_modules=method.exclude_modules)
    (known,) = explain([dataclasses.replace(site, path=path)], kinds=(site.kind,), **where)
    return path if known.match else ""


def tied_paths(base: nn.Module, path: str) -> list[str]:
    """The modules that have the weight of the one at `path`, itself among them, as HF PEFT's files have their rows."""
    weight = base.get_submodule(path).weight
    return [name for name, m in own_modules(base) if m._parameters.get("weight") is weight]


def ties_embeddings(base: nn.Module) -> bool:
    """Whether a model says, as transformers' do, that its embeddings are tied: what HF PEFT goes by.

    Where a module is tied by hand alone, HF PEFT trains the rows of the one that is named, and the others keep theirs.
    """
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    return bool(tied) and getattr(base, "_tied_weights_keys", None) is not None


def rows_of(path: str, rows: tuple[int, ...], name: str, module: str = "") -> Override:
    """Rows of the tensor of this name, as the adapter of a module's own: of the one at `path`."""
    return Override(f"{SAVED}.{path}.{TOKENS}", module, name, rows)
