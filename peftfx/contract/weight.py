"""WeightMethod: a method that acts at linear, conv, embedding or expert sites, and says the same thing twice.

Once on activations and once on weights. The compiler traces `forward` and splices it into the graph; `merge` replaces
it by `fold`. With dropout off,

    forward(site, op, x, op(x, *base), base, p, training=False) == op(x, *fold(site, base, p))

for every `base` and every `p`: the fold law, which `tests/laws/test_laws.py` holds every method to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from peftfx.contract.combination import Combination
from peftfx.contract.method import Base, Method, Op, Params, has_parameter
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site


def widened(p: Params) -> dict[str, Tensor]:
    """Parameters in fp32, as `fold` and `update` get them; whole numbers stay what they are."""
    return {name: t.float() if t.is_floating_point() else t for name, t in p.items()}


class Weighted(NamedTuple):
    """What one adapter does at a place, and its weight in a sum of adapters."""

    weight: float
    method: WeightMethod
    params: Params


class WeightMethod(Method):
    """A method that acts where a weight does: see the fold law above."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})

    def needs_place(self, module: nn.Module) -> bool:
        return has_parameter(module, axes=2)

    @abstractmethod
    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters, by HF PEFT's names; with them `forward` is the identity on `y` if it is `neutral`."""

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters beside those of `init`, made of what this place reads of what is shared."""
        return {}

    @abstractmethod
    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        """The adapted output, given the input `x` and the output `y = op(x, *base)`; shape and dtype of `y`."""

    @abstractmethod
    def fold(self, site: Site, base: Base, p: Params) -> Base:
        """The adapted weight and bias. Called with fp32 tensors; the caller rounds once."""

    @property
    def reruns(self) -> bool:
        """Whether `forward` runs `op` again and never reads `y`: `op` is then with all that acts at the site already.

        In a module `y` is not computed then, and is None.
        """
        return False

    @property
    def replaces(self) -> bool:
        """Whether `forward` does without `y`, at once what the site does and its own, where nothing acts before it.

        In a module `y` is not computed then, and is None.
        """
        return False

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """`fold` over what acts at the site already: `under` is what that made of `base`.

        As `forward`, where `y` is what acts already, and `base` is not.
        """
        return self.fold(site, under, p)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        """What `fold` does, as scales and a low-rank sum: for graphs that adapters are handed to.

        `base` is as it is stored, of any dtype: who needs its weight pays for reading it. What is returned is fp32.
        """
        what = f"{type(self).__name__} is neither a scale nor a low-rank sum: it cannot be put into a running graph"
        raise PeftfxError(what, site.path, "export the adapter merged")

    @abstractmethod
    def keys(self, site: Site) -> dict[str, str]:
        """For each parameter that is saved, its suffix in a HF PEFT checkpoint."""

    def apart_from_base(self, made: Params, read: Params) -> str:
        """Why a file is of another base, for a warning, given what `init` made and what the file has; empty if not.

        For methods whose files have constants that are made of the base.
        """
        return ""

    def apart_from_peft(self, site: Site, module: nn.Module) -> str:
        """Why HF PEFT computes something else at this module, for a warning; empty where it computes the same."""
        return ""

    def written(self, p: Params) -> tuple[Self, dict[str, Tensor]]:
        """The method and parameters that a checkpoint gets, given the parameters and what is remembered here."""
        return self, dict(p)

    def file_keys(self, site: Site) -> dict[str, str]:
        """For each tensor of `written`, its suffix in a HF PEFT checkpoint: that of `keys`, if these are the same."""
        return self.keys(site)

    def read(self, p: Params) -> dict[str, Tensor]:
        """The parameters that a checkpoint's tensors stand for: the inverse of `written`, where `file_keys` differ."""
        return dict(p)

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[Self, dict[str, Tensor]]:
        """A method and parameters for a fused site that do what the given ones do at its parts, by the parts' rows.

        HF PEFT knows no parts: this is how they are saved. By default parts cannot be.
        """
        what = f"files of HF PEFT hold {type(self).__name__} for whole weights, and here it acts on some rows of one"
        raise PeftfxError(what, site.path, f"target {site.role}, or export the adapter merged")

    @classmethod
    def combined(
        cls, site: Site, how: Combination, given: Sequence[Weighted]
    ) -> tuple[WeightMethod, dict[str, Tensor]]:
        """A method and parameters that stand for several adapters' at one place, each times its weight.

        HF PEFT's `add_weighted_adapter`.
        """
        what = f"adapters of {cls.__name__} cannot be summed"
        raise PeftfxError(what, site.path, "make them active together (set_adapter), or one at a time")
