"""PatternMethod: what a rule does where a graph computes what a pattern's function computes.

A pattern is no layer: HF PEFT knows none, and files of such methods are peftfx's own. What such a method does belongs
into the base's weights where it says how (`folds`), as

    forward(site, x, f(x, *weights), p, training=False) == f(x, *(fold(site, name, w, p) for each name, w))

for the pattern's function `f`. Otherwise it stays in the graph when that is merged, with its parameters as constants.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.contract.method import Method, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.patterns.pattern import Pattern
from peftfx.sites.site import PATTERN, PatternSite, Site


class PatternMethod(Method):
    """A method that acts at the matches of a pattern, which its class names.

        @dataclass(frozen=True, kw_only=True)
        class Beside(peftfx.PatternMethod):
            peft_type: ClassVar[str] = "BESIDE"
            pattern: ClassVar[peftfx.Pattern] = swiglu

    By default it acts at all of them.
    """

    pattern: ClassVar[Pattern]
    kinds: ClassVar[frozenset[str]] = frozenset({PATTERN})

    def __init_subclass__(cls, **options: Any) -> None:
        """Where it acts by default is the pattern's role."""
        super().__init_subclass__(**options)
        own = vars(cls).get("pattern")
        if own is not None and not isinstance(own, Pattern):
            raise PeftfxError(f"{cls.__name__}.pattern is no pattern", cls.__name__, "make it by @peftfx.pattern(...)")
        if own is not None and "default_target" not in vars(cls):
            cls.default_target = own.role

    def acts_at(self, site: Site) -> bool:
        """Whether this is a match of its pattern."""
        return site.kind == PATTERN and getattr(site, "pattern", "") == self.pattern.name

    @abstractmethod
    def init(self, site: PatternSite, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters; with them `forward` is the identity on `y` if the method is `neutral`.

        `site` has the shapes and dtypes of the match's operands; `like`, without elements, has the base's dtype and
        device.
        """

    @abstractmethod
    def forward(self, site: PatternSite, x: Tensor, y: Tensor, p: Params, training: bool) -> Tensor:
        """The adapted value, given the function's first argument and what it gives; shape and dtype of `y`.

        `site` is without its path: one trace serves all matches that are alike.
        """

    def folds(self, site: PatternSite) -> tuple[str, ...]:
        """Names of the function's arguments, weights or biases of layers, that do all that `forward` does; or none.

        Where one of them is no layer's at a match, or is read by something else too, nothing is folded there.
        """
        return ()

    def fold(self, site: PatternSite, name: str, weight: Tensor, p: Params) -> Tensor:
        """What stands in the place of an argument that `folds` names: shape of `weight`, in fp32, as `p` is.

        `weight` is as the function reads it. By default it is what `update` says; of a bias, [out], its scale `outer`.
        """
        update = self.update(site, name, p)
        if weight.ndim == 1:
            return weight if update.outer is None else weight * update.outer
        return update.apply(weight)

    def update(self, site: PatternSite, name: str, p: Params) -> Update:
        """What `fold` does to a linear weight, [out, in], as scales and a low-rank sum: for graphs with slots."""
        what = f"{type(self).__name__} does not say what it does to {name}, as scales and a low-rank sum"
        raise PeftfxError(what, site.path, f"write {type(self).__name__}.update, or export the adapter merged")

    def keys(self, site: PatternSite) -> dict[str, str]:
        """For each parameter that is saved, its name in files behind the site's path: by default its own."""
        return {name: name for name in self.init(site, torch.empty(0, device="meta"), None)}

    def naming(self, paths: Any, modules: Any) -> PatternMethod:
        return self
