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

from peftfx.contract.method import Method, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import ATTENTION, HeadedSite


class AttentionMethod(Method):
    """A method that acts at self-attentions. At each, `site.heads` has the heads and the scale."""

    default_target: ClassVar[str] = ATTENTION
    kinds: ClassVar[frozenset[str]] = frozenset({ATTENTION})

    @abstractmethod
    def init(self, site: HeadedSite, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters, by HF PEFT's names; `weight` is the key projection's, as it is stored."""

    @abstractmethod
    def reads(self, p: Params) -> Tensor:
        """What the key and value projections are run on, [1, n, site.heads.width]."""

    @abstractmethod
    def attend(
        self, site: HeadedSite, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
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

    def beside(self, site: HeadedSite, key: Tensor, value: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """What `attend` adds, as keys and values, [heads that are kept, n, features], of a softmax of their own.

        `attend` is then `output + softmax(query key^T) value`: what a graph can be given when it runs.
        """
        what = f"what {type(self).__name__} adds to an attention cannot be written as keys and values"
        raise PeftfxError(what, site.path, "export the adapter merged")

    @abstractmethod
    def keys(self, site: HeadedSite) -> dict[str, str]:
        """For each parameter that is saved, its suffix in a HF PEFT checkpoint."""

    def is_behind(self, site: HeadedSite) -> bool:
        """Whether `output` is what leaves the attention's module, behind the output projection."""
        return False

    def among(self, sites: Sequence[HeadedSite]) -> Sequence[HeadedSite]:
        """The attentions to act at, of those targeted, in the order in which they run."""
        return sites


def attend_beside(site: HeadedSite, query: Tensor, key: Tensor, value: Tensor, shown: Tensor | None = None) -> Tensor:
    """`softmax(query key^T) value`, the softmax in fp32; keys and values of each kept head serve a row of heads.

    Of no keys and values it is 0. Rows may have their own, [rows, heads, tokens, features]; `shown` [rows, tokens] then
    says which there are, and the values of the others are 0.
    """
    keys, values = key.to(query.dtype), value.to(query.dtype)
    if site.heads.count == site.heads.kept:
        return _attend(query, keys, values, None if shown is None else shown[:, None, None])
    # The query's heads in groups, not keys and values repeated: a reshape to a length of 0 means another one in ONNX.
    grouped = query.unflatten(1, (site.heads.kept, -1))
    seen = None if shown is None else shown[:, None, None, None]
    return _attend(grouped, keys.unsqueeze(-3), values.unsqueeze(-3), seen).flatten(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, shown: Tensor | None) -> Tensor:
    scores = query @ keys.transpose(-1, -2)
    if shown is not None:  # a finite number: where nothing is shown the softmax is of values that are 0
        scores = scores.masked_fill(~shown, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, torch.float32).to(query.dtype) @ values


def key_weight(base: nn.Module, site: HeadedSite) -> Tensor:
    """The weight of an attention's key projection in the base module."""
    weight = operator.attrgetter(site.heads.weight.partition(".")[2])(base)
    assert isinstance(weight, Tensor)
    return weight
