"""Deliberately wrong methods, one for each law: plausible mistakes, and the proof that a law sees what it is for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from peftfx.analysis.roles import find_sites
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.sequence import PROMPT, PromptMethod, with_text_sizes
from peftfx.contract.weight import WeightMethod
from peftfx.graph.graph import Graph
from peftfx.passes.slots.by_row import _Rows
from peftfx.passes.slots.layer import Effect, acted
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites


@dataclasses.dataclass(frozen=True)
class Scale(WeightMethod):
    """A right method, small enough to break: `y * (1 + l)`, one number for each output row of a linear layer."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    default_target: ClassVar[str] = "all-linear"
    peft_type: ClassVar[str] = "SCALE"

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"l": torch.zeros(base.weight.shape[0]), "seen": torch.rand(1, generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return (y * (1 + p["l"])).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        gain = 1 + p["l"]
        return Base(base.weight * gain[:, None], None if base.bias is None else base.bias * gain)

    def by_row(self, site: Site) -> frozenset[str] | None:
        return frozenset({"l"})

    def frozen(self) -> frozenset[str]:
        return frozenset({"seen"})

    def keys(self, site: Site) -> dict[str, str]:
        return {"l": "scale_l"}

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[Scale, dict[str, Tensor]]:
        gain = torch.zeros(base.weight.shape[0])
        for rows, p in parts.items():
            for start, stop in rows:
                gain[start:stop], p = p["l"][: stop - start], {**p, "l": p["l"][stop - start :]}
        return self, {"l": gain}


class StartsAtRandom(Scale):
    """Forgets that a new adapter changes nothing."""

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"l": torch.randn(base.weight.shape[0], generator=rng)}


class ForgetsTheBias(Scale):
    """Scales the output, and only the weight."""

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(super().fold(site, base, p).weight, base.bias)


class FoldsByTheLargestRow(Scale):
    """Says that rows fold by themselves, and divides by the largest number of them all."""

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        new = super().fold(site, base, p)
        return Base(new.weight / base.weight.abs().amax(), new.bias)


class FoldsInPlace(Scale):
    """Merges into the base's own tensor, which the adapted graph still reads."""

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        new = super().fold(site, base, p)
        return Base(base.weight.copy_(new.weight), new.bias)


class MovesTheBase(Scale):
    """Takes something out of the base when it starts, as HF PEFT's PiSSA does."""

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        base.weight.mul_(0.5)
        return {"l": torch.ones(base.weight.shape[0])}


class IgnoresTheSeed(Scale):
    """Draws from a generator of its own."""

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"l": torch.rand(base.weight.shape[0], generator=self._generator)}

    _generator: ClassVar[torch.Generator] = torch.Generator()


class CountsSites(Scale):
    """Acts by how many sites came before."""

    _count: ClassVar[itertools.count[int]] = itertools.count(1)

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] * next(self._count))


class DecaysTheBase(Scale):
    """Writes to the base's weight in passing."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        base.weight.detach().mul_(0.9)
        return super().forward(site, op, x, y, base, p, training)


class TrainsAConstant(Scale):
    """Updates in the forward what it says is frozen."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        p["seen"].add_(1)
        return super().forward(site, op, x, y, base, p, training)


class ReadsWhatItDoesNotSave(Scale):
    """Takes for a constant what is drawn anew on loading."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] * p["seen"])


class SavesHalf(Scale):
    """Leaves a parameter out of the file."""

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"l": torch.zeros(base.weight.shape[0]), "m": torch.zeros(base.weight.shape[0])}


class SharesAnotherEachTime(Scale):
    """Draws what its places share without a seed, and saves it nowhere."""

    def frozen(self) -> frozenset[str]:
        return frozenset({"seen", "common"})

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        return {"common": torch.rand(())}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] * p["common"])


class LooksAtTheBatch(Scale):
    """Divides by the size of the batch."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] / x.shape[0])


class IsNoisyInEval(Scale):
    """Drops out whether or not it trains."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] * torch.rand_like(y))


class LooksAtTheTrace(Scale):
    """Does in a graph, where its parameters are fake tensors while it is traced, what it does not do in a module."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * (1 + p["l"] * (1 if type(p["l"]) in (Tensor, nn.Parameter) else 2))


@dataclasses.dataclass(frozen=True)
class Glance(AttentionMethod):
    """A right attention method, small enough to break: each query attends to a gated prompt, too."""

    peft_type: ClassVar[str] = "GLANCE"

    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"prompt": torch.randn(1, 2, site.heads.width, generator=rng), "gate": torch.zeros(1)}

    def reads(self, p: Params) -> Tensor:
        return p["prompt"]

    def attend(
        self, site: Site, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
    ) -> Tensor:
        return output + p["gate"] * (query @ key.transpose(-1, -2)).softmax(-1) @ value

    def keys(self, site: Site) -> dict[str, str]:
        return {"prompt": "glance_prompt", "gate": "glance_gate"}


class StartsWithAnOpenGate(Glance):
    """Forgets that a new adapter changes nothing."""

    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {**super().init(site, weight, rng), "gate": torch.ones(1)}


class PromptsAtRandom(Glance):
    """Draws a part of its prompt anew in every call: there is nothing that an export could keep."""

    def reads(self, p: Params) -> Tensor:
        return p["prompt"] + torch.randn_like(p["prompt"])


class ScalesTheKeys(Glance):
    """Takes something out of the key projection when it starts."""

    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight.mul_(0.5)
        return super().init(site, weight, rng)


class DrawsForItself(Glance):
    """Starts from a generator of its own."""

    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        return super().init(site, weight, self._generator)

    _generator: ClassVar[torch.Generator] = torch.Generator()


class CountsAttentions(Glance):
    """Acts by how many attentions came before."""

    _count: ClassVar[itertools.count[int]] = itertools.count(1)

    def reads(self, p: Params) -> Tensor:
        return p["prompt"] * next(self._count)


class DetachesThePrompt(Glance):
    """Keeps the gradient from what it trains."""

    def reads(self, p: Params) -> Tensor:
        return p["prompt"].detach()


class ReadsAnotherPromptInAGraph(Glance):
    """Reads another prompt where it is traced."""

    def reads(self, p: Params) -> Tensor:
        return p["prompt"] if type(p["prompt"]) in (Tensor, nn.Parameter) else 2 * p["prompt"]


class KeepsItsPrompt(Glance):
    """Takes for a constant what is drawn anew on loading."""

    def frozen(self) -> frozenset[str]:
        return frozenset({"prompt"})

    def keys(self, site: Site) -> dict[str, str]:
        return {"gate": "glance_gate"}


class MixesRows(Glance):
    """Shares its attention among the rows of the batch."""

    def attend(
        self, site: Site, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
    ) -> Tensor:
        return output + p["gate"] * (query @ key.transpose(-1, -2)).softmax(0) @ value


@dataclasses.dataclass(frozen=True)
class Words(PromptMethod):
    """A right soft prompt, small enough to break: virtual tokens, each an embedding of its own."""

    peft_type: ClassVar[str] = "WORDS"

    def sized(self, base: nn.Module, site: Site) -> Words:
        return with_text_sizes(self, base, site)

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {PROMPT: torch.randn(self.saved_shape(), generator=rng)}

    def saved(self, p: Params, training: bool = False) -> Tensor:
        return p[PROMPT]


class SaysAnotherShape(Words):
    """Counts a token that it has not."""

    def saved_shape(self) -> tuple[int, ...]:
        rows, width = super().saved_shape()
        return rows + 1, width

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {PROMPT: torch.randn(super().saved_shape(), generator=rng)}


class ScalesWhatIsSaved(Words):
    """Does something to the saved prompt that no file tells: an encoder that is left out."""

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {**super().init(site, embed, rng), "gain": torch.rand(1, generator=rng)}

    def virtual(self, p: Params, training: bool) -> Tensor:
        return super().virtual(p, training) * p.get("gain", 1)


class DrawsItsOwnWords(Words):
    """Starts from a generator of its own."""

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        return super().init(site, embed, self._generator)

    _generator: ClassVar[torch.Generator] = torch.Generator()


class DetachesItsWords(Words):
    """Keeps the gradient from what it trains."""

    def virtual(self, p: Params, training: bool) -> Tensor:
        return super().virtual(p, training).detach()


class WordsAtRandom(Words):
    """Draws its words anew in every call: there is nothing that an export could keep."""

    def virtual(self, p: Params, training: bool) -> Tensor:
        return super().virtual(p, training) + torch.randn(p[PROMPT].shape)


class ScalesTheEmbedding(Words):
    """Takes something out of the embedding when it starts."""

    def init(self, site: Site, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        embed.weight.mul_(0.5)
        return super().init(site, embed, rng)


def sites_by_name(graph: Graph) -> Sites:
    """A finder that takes the role of a layer from what it is called."""
    named = {"q": "attention.query", "up": "mlp.up"}
    sites = (dataclasses.replace(s, role=named.get(s.path.rpartition(".")[2], "linear")) for s in find_sites(graph))
    return Sites(tuple(sites))


def forgets_the_low_rank_sum(
    site: Site, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, acting: Effect
) -> Tensor:
    """A layer with slots that reads no factors."""
    return acted(site, op, x, weight, bias, dataclasses.replace(acting, low=None))


def adds_the_bias_twice(site: Site, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, acting: Effect) -> Tensor:
    """A layer whose operation has its bias still."""
    y = acted(site, op, x, weight, bias, acting)
    return y if bias is None else y + bias


def takes_the_next_entry(rows: _Rows) -> fx.Node:
    """Rows that take what is another adapter's: the entry behind their own, and the last for the first."""
    index = _INDEX(rows)
    return rows.rewriter.after(index).trace(lambda index: 1 - index, index, where="entries")


_INDEX = _Rows._index
