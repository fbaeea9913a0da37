"""The difference of two checkpoints of a model, as updates of weights; and what a LoRA of it lacks.

Tensors are compared under all of their names. So a weight that two modules of the base share, and two of the tuned
checkpoint do not, has two differences, one for each module: a LoRA acts on each module by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.lora_conversion import holds, updates_of
from peftfx.errors import PeftfxError, listed, warn
from peftfx.graph.lazy_weights import exact
from peftfx.sites.blocks import turned
from peftfx.sites.site import WeightSite

_SHOWN = 3  #: how many names a message has
_ROUNDING = 1e-5  #: of the energy: what factors in float16 may lose


class CheckpointDifference:
    """What one checkpoint of a model changes in another: weights that a LoRA can act on, and all else.

    The energy of a change is the sum of its squares.

    Attributes:
        left: the names of the tensors that differ and that a LoRA cannot hold, each with the energy of its change.
        whole: the energy of all that differs.

    Args:
        base, tuned: the two checkpoints.
        sites: the places of the base's weights.

    Raises:
        PeftfxError: the two checkpoints do not have the same parameters.
    """

    @torch.no_grad()
    def __init__(self, base: nn.Module, tuned: nn.Module, sites: Iterable[WeightSite]) -> None:
        self._base = base
        self._own, self._others = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, tuned))
        own, others = self._own, self._others
        odd = [
            n for n in own.keys() | others.keys() if n not in own or n not in others or own[n].shape != others[n].shape
        ]
        if odd:
            what = f"the two checkpoints do not have the same tensors: {', '.join(sorted(odd)[:_SHOWN])}"
            raise PeftfxError(what, "tuned", "give a checkpoint of the same model")
        named = ((self._name(site), site) for site in sites if holds(site))
        self._sites = {name: site for name, site in named if name}
        pairs = {(id(own[n]), id(others[n])): n for n in reversed(own)}  # tied in both checkpoints: one name for all
        pairs |= {(id(own[n]), id(others[n])): n for n in self._sites}
        compared = dict.fromkeys((*pairs.values(), *self._sites))
        differ = [name for name in compared if not torch.equal(exact(own[name]), exact(others[name]))]
        self._energies = {name: _energy(self._change(name)) for name in differ}
        buffers = (dict(m.named_buffers(remove_duplicate=False)) for m in (base, tuned))
        self.left = {n: e for n, e in self._energies.items() if n not in self._sites} | _changed_buffers(*buffers)
        self.whole = sum(self._energies.values()) + sum(e for n, e in self.left.items() if n not in own)

    def _name(self, site: WeightSite) -> str:
        """Return the name of a site's weight under the module that reads it; empty if it has none there."""
        return next((name for name in (site.parameter, site.path) if name in self._own), "")

    def _change(self, name: str) -> Tensor:
        return exact(self._others[name]).float() - exact(self._own[name]).float()

    @torch.no_grad()
    def updates(self) -> Iterator[tuple[WeightSite, Tensor]]:
        """Yield the change of each weight that a LoRA can act on; one is in memory at a time."""
        for name, site in self._sites.items():
            if name in self._energies:
                yield site, turned(self._change(name), site.transposed)

    def tell_left(self) -> None:
        """Warn of what differs and a LoRA cannot hold, with its share of the energy."""
        if self.left:
            names = sorted(self.left, key=lambda name: -self.left[name])
            told = f"these tensors differ too, and a LoRA cannot hold them: {listed(names, _SHOWN)}"
            share = 100 * sum(self.left.values()) / self.whole if self.whole else 0
            warn(f"{told}; they have {share:.2g}% of the energy of all that differs")

    @torch.no_grad()
    def kept_by(self, lora: Adapter, kept: float) -> float:
        """Return the share of the energy of all that differs that a LoRA, added to the base's weights, keeps.

        Args:
            lora: the LoRA, as its files are read.
            kept: the share that it was computed to keep of the updates.

        Raises:
            PeftfxError: it keeps less.
        """
        left = sum(self.left.values())
        expected = left + (1 - kept) * (self.whole - left)
        lacks, rest = 0.0, {**self._energies, **self.left}
        for site, update in updates_of(self._base, lora):
            rest.pop(name := self._name(site), None)
            lacks += _energy(turned(self._change(name), site.transposed) - update)
        lacks += sum(rest.values())
        if not lacks <= expected + _ROUNDING * self.whole:
            shares = (100 * lacks / self.whole, 100 * expected / self.whole)
            what = "read back, the LoRA lacks {:.3g}% of the energy of what differs, and not {:.3g}%".format(*shares)
            raise PeftfxError(what, "tuned", "this is an error of peftfx: please report it with the models' configs")
        return 1 - lacks / self.whole


def _changed_buffers(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the names of buffers that differ, each with the energy of its change; that of whole numbers is 0."""
    found = {}
    for name in dict.fromkeys((*own, *others)):
        a, b = own.get(name), others.get(name)
        if a is None or b is None or a.shape != b.shape:
            found[name] = 0.0
        elif not torch.equal(a, b):
            found[name] = _energy((b.float() - a.float()).nan_to_num(0, 0, 0)) if a.is_floating_point() else 0.0
    return found


def _energy(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())
