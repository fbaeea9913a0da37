"""The class `MergeReport`: what a merge did to a base's weights; and the refusal of adapters that cannot be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.recipes import Rounding
from peftfx.contract.placed import Placements
from peftfx.errors import PeftfxError, how_many


@dataclass(frozen=True)
class MergeReport:
    """The results of a merge into the base's weights.

    Attributes:
        sites: the module paths whose weights changed.
        bytes: the size of the weights and biases that were written, trained copies included.
        adapter_bytes: the size of the adapters' tensors that were merged and are no longer needed.
        roundings: the error of each site's weight from rounding to the base's dtype; zero if that is fp32.
        untied: the weights that another module shared before the merge, and that are separate tensors now.
        dequantised: the format of each layer that was quantised, by its path; now torch's own layer is there.
    """

    sites: tuple[str, ...]
    bytes: int
    adapter_bytes: int = 0
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    dequantised: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, Rounding]:
        """The site with the largest rounding relative to its weight, with that rounding; zeros if all are exact."""
        return max(self.roundings.items(), key=lambda item: item[1].max_rel, default=("", Rounding()))

    def __repr__(self) -> str:
        return f"MergeReport({how_many(len(self.sites), 'site')}, {self.bytes:,} B)"

    def __str__(self) -> str:
        sites, (path, worst) = how_many(len(self.sites), "site"), self.worst
        lines = [
            f"merged {sites}: {self.bytes:,} bytes written, {self.adapter_bytes:,} of adapters folded",
            f"rounding: at most {worst}, at {path}" if worst.max_abs else "rounding: none, the weights are fp32's",
        ]
        lines += [f"untied: {', '.join(self.untied)}"] if self.untied else []
        if self.dequantised:
            formats = ", ".join(sorted(set(self.dequantised.values())))
            lines.append(f"no longer quantised ({formats}): {how_many(len(self.dequantised), 'layer')}")
        return "\n".join(lines)


def refuse_unmergeable(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters that act beside the weights, because such an effect cannot be merged into them."""
    placements = Placements(p for adapter in adapters.values() for p in adapter.placements)
    if placements.prompts:
        hint = "export it: there it becomes a constant of the graph; or make adapters of weights alone active"
        raise PeftfxError("a soft prompt has no place in the base's weights", ", ".join(adapters), hint)
    for placement in (p for p in placements.weights if p.on_weight is None):
        hint = "export it: the exported graph has its operations; or make other adapters active"
        raise PeftfxError(placement.method.unfoldable, placement.site.path, hint)
    for beside in placements.attentions:
        what = f"what {type(beside.method).__name__} adds to an attention has no place in the base's weights"
        hint = "export it: there its keys and values become constants; or make adapters of weights alone active"
        raise PeftfxError(what, beside.site.path, hint)
