"""AttentionMethod: what a rule does at an attention, with keys and values of its own beside the text's.

The attention's own layers make them: the compiler runs its key and value projections on what the method says, as one
more call of these layers. Whatever adapts a projection, a LoRA of this adapter or of another, adapts that call too, as
it does in HF PEFT, which calls the modules. What depends on no input, keys and values included, is folded on export.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.method import Method, Params
from peftfx.sites import Site

ATTENTION = "attention"


class AttentionMethod(Method):
    """A method that acts at self-attentions. At each, `site.heads` has the heads and the scale."""

    default_target: ClassVar[str] = ATTENTION
    kinds: ClassVar[frozenset[str]] = frozenset({ATTENTION})

    @abstractmethod
    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters, by HF PEFT's names; `weight` is the key projection's, as it is stored."""

    @abstractmethod
    def reads(self, p: Params) -> Tensor:
        """What the key and value projections are run on, [1, n, site.heads.width]."""

    @abstractmethod
    def attend(
        self, site: Site, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
    ) -> Tensor:
        """The adapted output, of the shape and dtype of `output`.

        Args:
            site: the attention; its path and calls are left out, for one trace serves many.
            query: [batch, heads, length, features], as the attention takes it: rotated, normed and scaled.
            output: [batch, heads, length, features]. What the attention gives, ahead of its output projection; behind
                it where `is_behind` says so.
            key, value: [heads that are kept, n, features], as the (adapted) projections give them: not rotated.
            p: the parameters.
            training: whether dropout is on.
        """

    @abstractmethod
    def keys(self, site: Site) -> dict[str, str]:
        """For each parameter that is saved, its suffix in a HF PEFT checkpoint."""

    def is_behind(self, site: Site) -> bool:
        """Whether `output` is what leaves the attention's module, behind the output projection."""
        return False

    def among(self, sites: Sequence[Site]) -> Sequence[Site]:
        """The attentions to act at, of those targeted, in the order in which they run."""
        return sites


def key_weight(base: nn.Module, site: Site) -> Tensor:
    """The weight of an attention's key projection in the base module."""
    assert site.heads is not None
    weight = operator.attrgetter(site.heads.weight.partition(".")[2])(base)
    assert isinstance(weight, Tensor)
    return weight
