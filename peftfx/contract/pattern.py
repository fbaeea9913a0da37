"""PatternMethod: a method that acts where a graph computes what a pattern's function computes.

A pattern is not a layer: HF PEFT has no patterns, and files of such methods are peftfx's own. If the method says how
(`folds`), merging puts its effect into the base's weights, such that

    forward(site, x, f(x, *weights), p, training=False) == f(x, *(fold(site, name, w, p) for each name, w))

for the pattern's function `f`. Otherwise a merged graph keeps the method's operations, with its parameters as
constants.
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
    """A method that acts at the matches of a pattern. Its class names the pattern.

    By default the method acts at all matches.

    Examples:
        >>> @peftfx.pattern("activation.silu", x="batch length width")
        ... def silu(x):
        ...     return F.silu(x)
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Louder(peftfx.PatternMethod):
        ...     peft_type: ClassVar[str] = "LOUDER"
        ...     pattern: ClassVar[peftfx.Pattern] = silu
        ...
        ...     def init(self, site, like, rng):
        ...         return {"scale": like.new_ones(site.width)}
        ...
        ...     def forward(self, site, x, y, p, training):
        ...         return y * p["scale"]
        >>> adapted = peftfx.transform(model, Louder())
    """

    pattern: ClassVar[Pattern]
    kinds: ClassVar[frozenset[str]] = frozenset({PATTERN})

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the pattern's role the default target."""
        super().__init_subclass__(**options)
        own = vars(cls).get("pattern")
        if own is not None and not isinstance(own, Pattern):
            raise PeftfxError(f"{cls.__name__}.pattern is no pattern", cls.__name__, "make it by @peftfx.pattern(...)")
        if own is not None and "default_target" not in vars(cls):
            cls.default_target = own.role

    def acts_at(self, site: Site) -> bool:
        """Return whether `site` is a match of the method's pattern."""
        return site.kind == PATTERN and getattr(site, "pattern", "") == self.pattern.name

    @abstractmethod
    def init(self, site: PatternSite, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Return new parameters. With them `forward` is the identity on `y` if the method is `neutral`.

        `site` has the shapes and dtypes of the match's operands. `like` has no elements, and the base's dtype and
        device.
        """

    @abstractmethod
    def forward(self, site: PatternSite, x: Tensor, y: Tensor, p: Params, training: bool) -> Tensor:
        """Return the adapted value for the function's argument `x` and result `y`, of shape and dtype of `y`.

        `site` has no path, so that one trace serves all equal matches.
        """

    def folds(self, site: PatternSite) -> tuple[str, ...]:
        """Return the names of the function's arguments that can be changed to do all that `forward` does.

        They are weights or biases of layers. Where one of them is not a layer's tensor at a match, or something else
        reads it too, nothing is folded there. By default there are none, and the method stays in the graph.
        """
        return ()

    def fold(self, site: PatternSite, name: str, weight: Tensor, p: Params) -> Tensor:
        """Return the new value of an argument that `folds` names: shape of `weight`, in fp32 as `p` is.

        `weight` has the layout that the function reads. By default `update` is applied; to a bias, [out], only its
        scale `outer`.
        """
        update = self.update(site, name, p)
        if weight.ndim == 1:
            return weight if update.outer is None else weight * update.outer
        return update.apply(weight)

    def update(self, site: PatternSite, name: str, p: Params) -> Update:
        """Return what `fold` does to a linear weight, [out, in], as scales and a low-rank sum, for slots."""
        what = f"{type(self).__name__} does not say what it does to {name}, as scales and a low-rank sum"
        raise PeftfxError(what, site.path, f"write {type(self).__name__}.update, or export the adapter merged")

    def keys(self, site: PatternSite) -> dict[str, str]:
        """Return the name in files of each parameter that is saved, after the site's path: by default its own."""
        return {name: name for name in self.init(site, torch.empty(0, device="meta"), None)}

    def naming(self, paths: Any, modules: Any) -> PatternMethod:
        return self
