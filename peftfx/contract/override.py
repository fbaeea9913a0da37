"""Overrides: tensors of the base that an adapter replaces by copies it trains, and the methods that do nothing else.

Nothing is computed beside the base: within the module, the graph reads the copies. That is exact whatever the module
does with its tensors. Merged, a copy is the tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peftfx.contract.method import Method, has_parameter
from peftfx.sites.site import NORM, WEIGHT_KINDS, Site

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

    def rows(self) -> tuple[int, ...]:
        """The rows of each tensor that are trained, where not all are."""
        return ()

    @abstractmethod
    def suffix(self, name: str) -> str:
        """A copy's suffix in a HF PEFT checkpoint."""


def copies_of(base: nn.Module, method: OverrideMethod, site: Site) -> tuple[Override, ...]:
    """The tensors that a method trains copies of at a site: of its module, or the bare parameter that it is.

    Rows are those of the tensor wherever the base uses it, in a tied head too, if the model says that it ties.
    """
    try:
        module, own = site.path, base.get_submodule(site.path).state_dict(keep_vars=True)
        names = {name: name for name in own if "." not in name}
    except AttributeError:
        module, _, name = site.weight.partition(".")[2].rpartition(".")
        names = {"weight": name}
    copied = method.copied(site, list(names))
    if rows := method.rows():
        if not ties_embeddings(base):
            return tuple(rows_of(site.path, rows, names[n], module) for n in copied)
        return tuple(rows_of(site.path, rows, f"{module}.{names[n]}".removeprefix(".")) for n in copied)
    return tuple(Override(f"{SAVED}.{site.path}.{n}", module, names[n]) for n in copied)


def ties_embeddings(base: nn.Module) -> bool:
    """Whether a model says, as transformers' do, that its embeddings are tied: what HF PEFT goes by.

    Where a module is tied by hand alone, HF PEFT trains the rows of the one that is named, and the others keep theirs.
    """
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    return bool(tied) and getattr(base, "_tied_weights_keys", None) is not None


def rows_of(path: str, rows: tuple[int, ...], name: str, module: str = "") -> Override:
    """Rows of the tensor of this name, as the adapter of a module's own: of the one at `path`."""
    return Override(f"{SAVED}.{path}.{TOKENS}", module, name, rows)
