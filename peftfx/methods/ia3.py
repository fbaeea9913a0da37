"""(IA)^3: learned vectors that scale a layer's inputs or outputs (Liu et al. 2022, arXiv:2205.05638).

With `x` the site's input and `y = op(x, W, b)` its output, `forward` is `y * l`, bias included. At a feed-forward
module `forward` is `op(x * l, W, b)`. The paper scales keys, values, and the hidden activations of the feed-forward.
That is the default here, by roles; HF PEFT has a table of module names for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, along_channels, along_columns, along_rows, row_index
from peftfx.contract.combination import Combination
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import Weighted, WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.patterns import compiled
from peftfx.sites.site import Site

L = "ia3_l"


@dataclass(frozen=True, kw_only=True)
class IA3(WeightMethod):
    """A learned vector that scales the output, or the input, of linear and conv layers.

    Args:
        feedforward_modules: the modules whose input is scaled, among those targeted: a regular expression that matches
            the whole path, or a sequence of ends of paths, as in HF PEFT. By default those of role `mlp.down`.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        init_ia3_weights: whether vectors start at 1, the identity; otherwise they start at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.IA3(target="attention.key | attention.value | mlp.down"))
    """

    feedforward_modules: str | Sequence[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    peft_type: ClassVar[str] = "IA3"
    default_target: ClassVar[str] = "attention.key | attention.value | mlp.down"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    layered: ClassVar[bool] = False

    @property
    def feedforward(self) -> bool:
        """Whether this method, as configured for a site by `at`, scales the input."""
        return bool(self.feedforward_modules)

    @property
    def reruns(self) -> bool:
        return self.feedforward

    @property
    def neutral(self) -> bool:
        return self.init_ia3_weights

    def at(self, site: Site) -> IA3:
        """Return this method with `feedforward_modules` that match every path or none."""
        return dataclasses.replace(self, feedforward_modules=".*" if self._is_feedforward(site) else ())

    def _is_feedforward(self, site: Site) -> bool:
        if self.feedforward_modules is None:
            return site.role == "mlp.down"
        if isinstance(self.feedforward_modules, str):
            return bool(compiled(self.feedforward_modules, "feedforward_modules").fullmatch(site.path))
        return any(site.path.endswith(name) for name in self.feedforward_modules)

    def keys(self, site: Site) -> dict[str, str]:
        return {L: L}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape[0], base.weight.shape[1] * site.groups
        if site.kind == "conv":
            shape = (1, inner if self.feedforward else out, *(1,) * (base.weight.ndim - 2))
        else:
            shape = (1, inner) if self.feedforward else (out, 1)
        scale = torch.ones(shape, dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        return {L: scale if self.init_ia3_weights else scale.normal_(generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        scale = along_channels(p[L].flatten(), site)
        if self.feedforward:
            return op((x * scale).to(x.dtype), base.weight, base.bias)
        return (y * scale).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        scale = p[L].flatten()
        if self.feedforward:
            groups = 1 if base.weight.shape[1] == len(scale) else site.groups  # other adapters may make it dense
            return Base(base.weight * along_columns(scale, base.weight, groups), base.bias)
        bias = None if base.bias is None else base.bias * scale
        return Base(base.weight * along_rows(scale, base.weight), bias)

    def changes_nothing(self, saved: Mapping[str, Tensor]) -> bool:
        return saved.keys() == {L} and bool((saved[L] == 1).all())

    def by_row(self, site: Site) -> frozenset[str] | None:
        if site.kind != "linear":
            return None
        return frozenset() if self.feedforward else frozenset({L})

    def update(self, site: Site, base: Base, p: Params) -> Update:
        scale = p[L].flatten().float()
        if self.feedforward:
            return Update(inner=scale)
        return Update(outer=scale, bias=None if base.bias is None else base.bias * scale)

    def gather(self, methods: Mapping[str, Method]) -> IA3:
        """Return a rule whose `feedforward_modules` are an expression: HF PEFT requires a list to be among targets."""
        if self.feedforward_modules is not None and self.target_modules is not None:
            return self
        inputs = {path for path, m in methods.items() if isinstance(m, IA3) and m.feedforward}
        ends = {path.rpartition(".")[2] for path in inputs}
        if ends & {path.rpartition(".")[2] for path in methods.keys() - inputs}:
            found = "|".join(re.escape(path) for path in sorted(inputs))
        else:
            found = rf"(.*\.)?({'|'.join(re.escape(end) for end in sorted(ends))})"
        return dataclasses.replace(self, feedforward_modules=found if inputs else ())

    @classmethod
    def combined(
        cls, site: Site, how: Combination, given: Sequence[Weighted]
    ) -> tuple[WeightMethod, dict[str, Tensor]]:
        """Return the sum of the vectors. As in HF PEFT, a vector of 1, which changes nothing, counts as 1."""
        first = given[0].method
        if how != Combination():
            raise PeftfxError(
                f"IA3 has no combination {how.combination_type!r}", site.path, "combination_type='linear'"
            )
        if len({isinstance(w.method, IA3) and w.method.feedforward for w in given}) > 1:
            what = "one adapter scales the input here, and another the output"
            hint = "make both active instead: set_adapter([...]), or --adapter without weights"
            raise PeftfxError(what, site.path, hint)
        return first, {L: sum((w.weight * w.params[L] for w in given[1:]), given[0].weight * given[0].params[L])}

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[IA3, dict[str, Tensor]]:
        """Return one vector, with 1 at the rows of no part."""
        if self.feedforward:
            what = "HF PEFT cannot scale the input of some rows of a weight alone"
            raise PeftfxError(what, site.path, "target the whole module, or export the adapter merged")
        scale = next(iter(parts.values()))[L].new_ones(base.weight.shape[0])
        for rows, p in parts.items():
            scale[row_index(rows)] = p[L].flatten()
        ones = (1,) * (base.weight.ndim - 2)
        return self, {L: scale.view(1, -1, *ones) if site.kind == "conv" else scale.view(-1, 1)}
