"""AttentionMethod: a method that adds keys and values of its own to an attention, beside those of the text.

The attention's own layers compute these keys and values: the compiler calls the key and value projections once more, on
the tensor that `reads` gives. A LoRA on a projection, of this adapter or of another, adapts that call too, as in HF
PEFT, which calls the modules. What depends on no input is computed once, at export; that includes the keys and values.
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
    """A method that acts at self-attentions. `site.heads` has the heads and the scale of each."""

    default_target: ClassVar[str] = ATTENTION
    kinds: ClassVar[frozenset[str]] = frozenset({ATTENTION})

    @abstractmethod
    def init(self, site: HeadedSite, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Return new parameters, by HF PEFT's names. `weight` is the key projection's, in its stored layout."""

    @abstractmethod
    def reads(self, p: Params) -> Tensor:
        """Return the input that the key and value projections are run on, [1, n, site.heads.width]."""

    @abstractmethod
    def attend(
        self, site: HeadedSite, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
    ) -> Tensor:
        """Return the adapted output, of the shape and dtype of `output`.

        Args:
            site: the attention, without its path and calls, so that one trace serves many sites.
            query: [batch, heads, length, features], as the attention uses it: rotated, normed and scaled.
            output: [batch, heads, length, features], the attention's output before its output projection; after the
                projection if `is_behind`.
            key, value: [kept heads, n, features], the outputs of the (adapted) projections, not rotated. Kept heads are
                the heads that the key/value cache has.
            p: the parameters.
            training: whether dropout is on.
        """

    def beside(self, site: HeadedSite, key: Tensor, value: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Return what `attend` adds, as keys and values [kept heads, n, features] of a separate softmax.

        `attend` is then `output + softmax(query key^T) value`. A graph can take such keys and values as inputs.
        """
        what = f"what {type(self).__name__} adds to an attention cannot be written as keys and values"
        raise PeftfxError(what, site.path, "export the adapter merged")

    @abstractmethod
    def keys(self, site: HeadedSite) -> dict[str, str]:
        """Return the suffix in a HF PEFT checkpoint of each parameter that is saved."""

    def is_behind(self, site: HeadedSite) -> bool:
        """Return whether `output` is the output of the attention's module, after the output projection."""
        return False

    def among(self, sites: Sequence[HeadedSite]) -> Sequence[HeadedSite]:
        """Return the attentions to act at, of the targeted `sites`, in the order in which they run."""
        return sites


def attend_beside(site: HeadedSite, query: Tensor, key: Tensor, value: Tensor, shown: Tensor | None = None) -> Tensor:
    """Return `softmax(query key^T) value`, the softmax in fp32. Each kept head serves a group of query heads.

    Without keys and values the result is 0. Rows of the batch may have keys and values of their own, [rows, heads,
    tokens, features]; `shown` [rows, tokens] then marks the tokens that exist, and the values of all others must be 0.
    """
    keys, values = key.to(query.dtype), value.to(query.dtype)
    if site.heads.count == site.heads.kept:
        return _attend(query, keys, values, None if shown is None else shown[:, None, None])
    # The query's heads are grouped; keys and values are not repeated, because ONNX reads a reshape to length 0
    # differently.
    grouped = query.unflatten(1, (site.heads.kept, -1))
    seen = None if shown is None else shown[:, None, None, None]
    return _attend(grouped, keys.unsqueeze(-3), values.unsqueeze(-3), seen).flatten(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, shown: Tensor | None) -> Tensor:
    scores = query @ keys.transpose(-1, -2)
    if shown is not None:  # a finite number: where nothing is shown, the softmax weighs values that are 0
        scores = scores.masked_fill(~shown, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, torch.float32).to(query.dtype) @ values


def key_weight(base: nn.Module, site: HeadedSite) -> Tensor:
    """Return the weight of an attention's key projection in the base module."""
    weight = operator.attrgetter(site.heads.weight.partition(".")[2])(base)
    assert isinstance(weight, Tensor)
    return weight
