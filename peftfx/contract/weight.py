"""WeightMethod: a method at linear, conv, embedding or expert sites, defined on activations and on weights.

`forward` acts on activations: the compiler traces it and inserts it into the graph. `fold` acts on weights: `merge`
uses it in place of `forward`. With dropout off,

    forward(site, op, x, op(x, *base), base, p, training=False) == op(x, *fold(site, base, p))

for every `base` and every `p`. This is the fold law. `tests/laws/test_laws.py` checks it for every method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
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
    """Return parameters in fp32, as `fold` and `update` get them. Whole numbers keep their dtype."""
    return {name: t.float() if t.is_floating_point() else t for name, t in p.items()}


class Weighted(NamedTuple):
    """An adapter's method and parameters at a place, and its weight in a sum of adapters."""

    weight: float
    method: WeightMethod
    params: Params


class WeightMethod(Method):
    """A method that acts at sites with a weight: see the fold law above."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})

    def needs_place(self, module: nn.Module) -> bool:
        return has_parameter(module, axes=2)

    @abstractmethod
    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Return new parameters, by HF PEFT's names. With them `forward` is the identity on `y` if `neutral`."""

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Return further new parameters, made from the shared tensors that this place reads."""
        return {}

    def past_start(self, p: Params) -> dict[str, Tensor]:
        """Return the parameters that are others where the base's weight is what the method's start has left of it.

        HF PEFT's start may take a part out of the base's weight. A file that has this weight has it without that part.
        """
        return {}

    @abstractmethod
    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        """Return the adapted output for `x` and `y = op(x, *base)`, of the shape and dtype of `y`."""

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        """Return the adapted weight and bias. The given tensors are fp32; the caller rounds once.

        A method has a `fold` of its own, or says in `unfoldable` why no weight does what `forward` does.

        Raises:
            PeftfxError: the method is unfoldable.
        """
        raise PeftfxError(self.unfoldable, site.path, "export the adapter: the exported graph has its operations")

    @property
    def reruns(self) -> bool:
        """Whether `forward` runs `op` again and never reads `y`. `op` then has all that acts at the site already.

        In a module `y` is not computed then, and is None.
        """
        return False

    @property
    def replaces(self) -> bool:
        """Whether `forward` computes the whole output, without `y`, where no other method acts first.

        In a module `y` is not computed then, and is None.
        """
        return False

    @property
    def adds(self) -> bool:
        """Whether `forward` is `y` and a term without `y`, which HF PEFT rounds to `y`'s dtype at a quantised layer."""
        return False

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods at the site: `under` is what they made of `base`.

        This corresponds to `forward`, where `y` includes the earlier methods, and `base` does not.
        """
        return self.fold(site, under, p)

    def by_row(self, site: Site) -> frozenset[str] | None:
        """Return the parameters that have a row for each output row of the weight, if `fold` can go row by row.

        `fold` and `fold_over` may then be called with some rows of the weight and the bias, and with the same rows of
        these parameters, and give the same rows of the result. So a merge needs no second copy of a weight. None, the
        default, if a row depends on others, or on its number.
        """
        return None

    def update(self, site: Site, base: Base, p: Params) -> Update:
        """Return what `fold` does, as scales and a low-rank sum, for graphs that take adapters as inputs.

        `base` has its stored dtype, whatever that is; reading the weight of a quantised base costs time. The returned
        tensors are fp32.
        """
        what = f"{type(self).__name__} is neither a scale nor a low-rank sum: it cannot be put into a running graph"
        raise PeftfxError(what, site.path, "export the adapter merged")

    @abstractmethod
    def keys(self, site: Site) -> dict[str, str]:
        """Return the suffix in a HF PEFT checkpoint of each parameter that is saved."""

    def apart_from_base(self, made: Params, read: Params) -> str:
        """Return why the constants `read` from a file belong to another base than those `made` here.

        For a warning; empty if they are of one base. For methods whose files have constants that are computed from the
        base.
        """
        return ""

    def apart_from_peft(self, site: Site, module: nn.Module) -> str:
        """Return why HF PEFT computes something else at this module, for a warning. Empty if it does not."""
        return ""

    def moves_weight_in_peft(self, site: Site) -> bool:
        """Return whether HF PEFT changes the base's weight itself when it loads the adapter; peftfx never does."""
        return False

    def written(self, p: Params) -> tuple[Self, dict[str, Tensor]]:
        """Return the method and parameters that a checkpoint gets. `p` includes what training remembers here."""
        return self, dict(p)

    def file_keys(self, site: Site) -> dict[str, str]:
        """Return the suffix in a HF PEFT checkpoint of each tensor of `written`: by default from `keys`."""
        return self.keys(site)

    def read(self, p: Params) -> dict[str, Tensor]:
        """Return the parameters that a checkpoint's tensors stand for: the inverse of `written`."""
        return dict(p)

    def taken_back(self, p: Params, rule: Method, saved: Params, path: str) -> dict[str, Tensor] | None:
        """Return the values of `p` that `written` makes `saved` of, or None if it does not: by default None.

        Args:
            p: a place's parameters and constants, and what training remembers there.
            rule: the rule of a file, at all of its places.
            saved: the file's parameters at this place.
            path: the path of the place's module.
        """
        return None

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[Self, dict[str, Tensor]]:
        """Return a method and parameters of a fused site that replace those of its `parts`, by the parts' rows.

        HF PEFT has no parts, so parts are saved in this form. By default parts cannot be saved.
        """
        what = f"files of HF PEFT hold {type(self).__name__} for whole weights, and here it acts on some rows of one"
        raise PeftfxError(what, site.path, f"target {site.role}, or export the adapter merged")

    @classmethod
    def combined(
        cls, site: Site, how: Combination, given: Sequence[Weighted]
    ) -> tuple[WeightMethod, dict[str, Tensor]]:
        """Return a method and parameters that stand for several adapters at one place, each times its weight.

        As HF PEFT's `add_weighted_adapter` does.
        """
        what = f"adapters of {cls.__name__} cannot be summed"
        raise PeftfxError(what, site.path, "make them active together (set_adapter), or one at a time")

    def of_file(self) -> object:
        """Return what a file has once for all of its places, and combinations may differ in; by default nothing."""
        return None

    def alike(self, site: Site, p: Params, others: Collection[object]) -> tuple[WeightMethod, Params]:
        """Return a combination at one place as it is in one file with those at other places; by default as it is.

        Args:
            site: the place.
            p: the combination's parameters there.
            others: what `of_file` gives at all places.
        """
        return self, p
