"""Overrides: trained copies of the base's own tensors, and the methods that only train such copies.

Nothing is computed beside the base: inside the module, the graph reads the copies instead. That is exact, whatever the
module does with its tensors. Merging puts the copy in the tensor's place.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peftfx.bases.embeddings import embedding_path
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method, has_parameter
from peftfx.errors import PeftfxError
from peftfx.graph.places import has_module
from peftfx.sites.site import NORM, WEIGHT_KINDS, Site
from peftfx.sites.target import Where, explain

SAVED = "saved"  #: the folder of an adapter in which it keeps copies of the base's own tensors
TOKENS = "trainable_tokens_delta"  #: HF PEFT's name for the rows of an embedding that an adapter trains


@dataclass(frozen=True)
class Override:
    """A tensor of the base, or some of its rows, that an adapter replaces by its own within one module.

    Attributes:
        key: where the adapter keeps its tensor, a dotted name.
        module: the module path within which uses of the base's tensor are replaced.
        name: the tensor's name, relative to the module.
        rows: the rows of the base's tensor that the adapter's tensor replaces; empty for all rows.
        trained: whether the adapter trains its tensor. A tensor that was only read from a file is not trained.
        tied: whether it is a copy of a module's weight that acts at all modules which share the weight.
        others: further names of the same tensor within the module: as in HF PEFT, one copy stands for all of them.
    """

    key: str
    module: str
    name: str
    rows: tuple[int, ...] = ()
    trained: bool = True
    tied: bool = False
    others: tuple[str, ...] = ()

    def by_each_name(self) -> tuple[Override, ...]:
        """Return the override by each of the tensor's names within the module, as a file has it."""
        others = (f"{SAVED}.{self.module}.{name}" for name in self.others)
        return self, *(Override(key, self.module, name) for key, name in zip(others, self.others, strict=True))

    @property
    def stands(self) -> bool:
        """Whether the tensor counts as the base's own, as HF PEFT counts a trained bias. Copies and rows are extra."""
        return self.trained and not self.module and not self.rows and not self.tied

    @property
    def path(self) -> str:
        """The path of the module under which the adapter keeps its tensor."""
        return self.key.removeprefix(f"{SAVED}.").rpartition(".")[0]

    @property
    def indices(self) -> str:
        """The name under which the adapter keeps the rows' indices."""
        return f"{self.key.rpartition('.')[0]}.token_indices"


class OverrideMethod(Method):
    """A method that trains copies of the tensors of the targeted modules."""

    kinds: ClassVar[frozenset[str]] = frozenset({*WEIGHT_KINDS, NORM})

    def needs_place(self, module: nn.Module) -> bool:
        return has_parameter(module, axes=1)

    @abstractmethod
    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        """Return the tensors to copy, of the `names` that the site's module holds.

        Parameters are trained. Buffers, such as a batch norm's averages, are copied too.
        """

    @abstractmethod
    def suffix(self, name: str) -> str:
        """Return the suffix of a copy in a HF PEFT checkpoint."""

    def copy_mark(self) -> str:
        return self.suffix("")


def copies_of(base: nn.Module, method: OverrideMethod, site: Site) -> tuple[Override, ...]:
    """Return the overrides of a method at a site: of tensors of the site's module, or of the bare parameter.

    Trained rows of the model's embedding replace the tensor's rows wherever the base uses them, also in a tied head:
    see `tied_embedding`.
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
    """Return HF PEFT's path of the tied embedding, if the method trains rows of it at this site; else "".

    As in HF PEFT: another module may have the same tensor, such as T5's `encoder.embed_tokens`. If that module is
    named, and not the model's embedding (`shared`), its trained rows are used only in that module.
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
    """Return the paths of all modules that share the weight of the module at `path`, including `path`."""
    weight = base.get_submodule(path)._parameters.get("weight")
    if weight is None:  # an image model's embedding is no table
        return [path]
    return [name for name, m in own_modules(base) if m._parameters.get("weight") is weight]


def rows_are_trained(path: str) -> PeftfxError:
    """Return the error for a method that acts on all of a weight of which rows are trained."""
    what = "a rule trains some rows of this weight (tokens), and another method acts on the whole weight"
    return PeftfxError(what, path, "leave this module out of one of the two rules")


def ties_embeddings(base: nn.Module) -> bool:
    """Return whether a model says, as transformers' do, that its embeddings are tied. HF PEFT goes by this.

    Where modules are tied only by hand, HF PEFT trains the rows of the named module, and the other modules keep theirs.
    """
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    return bool(tied) and getattr(base, "_tied_weights_keys", None) is not None


def rows_of(path: str, rows: tuple[int, ...], name: str, module: str = "") -> Override:
    """Return an override of rows of the tensor `name`, kept in the adapter under the module at `path`."""
    return Override(f"{SAVED}.{path}.{TOKENS}", module, name, rows)
