"""VB-LoRA: low-rank factors mixed from one bank of vectors (Li et al. 2024, arXiv:2405.15179).

All places of a rule share a trained bank [num_vectors, vector_length]. The rows of `A` [r, in] and the columns of `B`
[out, r] are cut into pieces of this length. Each piece has trained logits: it is the mean of the vectors of its `topk`
largest logits, weighted by their softmax. `forward` is `y + B A dropout(x)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.factored import FactoredMethod
from peftfx.contract.method import Base, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

BANK, LOGITS = "vblora_vector_bank", ("vblora_logits_A", "vblora_logits_B")


@dataclass(frozen=True, kw_only=True)
class VBLoRA(FactoredMethod):
    """Factors of linear layers, mixed from a bank of vectors that all layers share.

    Args:
        r: the rank of the update.
        num_vectors, vector_length: the size of the bank; the length divides the inputs and the outputs of each layer.
        topk: how many vectors a piece is mixed from.
        save_only_topk_weights: whether files have only the weights of these vectors. Such an adapter cannot be trained
            on after loading, as the logits of the other vectors are unknown.
        vblora_dropout: dropout on the adapter's input in training.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (vblora_only).
        init_vector_bank_bound: the bound of the bank's uniform start values.
        init_logits_std: the standard deviation of the logits' normal start values. As in HF PEFT, a new adapter is not
            quite the identity.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.VBLoRA(r=4, num_vectors=32, vector_length=32))
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    peft_type: ClassVar[str] = "VBLORA"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "num_vectors", "vector_length", "topk")
        if self.topk > self.num_vectors:
            raise PeftfxError(f"topk={self.topk} is more than num_vectors={self.num_vectors}", "topk", "lower topk")

    @property
    def neutral(self) -> bool:
        return False

    @property
    def input_dropout(self) -> float:
        return self.vblora_dropout

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        bank = like.new_empty(self.num_vectors, self.vector_length, dtype=adapter_dtype(like.dtype))
        bound = self.init_vector_bank_bound
        return {BANK: bank.uniform_(-bound, bound, generator=rng)}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {BANK: f"base_model.{BANK}"}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in LOGITS}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape
        length = self.vector_length
        if out % length or inner % length:
            what = f"vectors of length {length} do not divide a weight of {out} x {inner}"
            raise PeftfxError(what, site.path, "give a vector_length that divides both")
        new = base.weight.new_empty(0, dtype=adapter_dtype(base.weight.dtype))
        shapes = (self.r, inner // length, self.num_vectors), (out // length, self.r, self.num_vectors)
        made = (new.new_empty(shape).normal_(std=self.init_logits_std, generator=rng) for shape in shapes)
        return dict(zip(LOGITS, made, strict=True))

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        best, indices = logits.topk(self.topk, -1)
        return (best.softmax(-1).unsqueeze(-1) * bank[indices]).sum(-2)

    def factors(self, base: Base, p: Params) -> tuple[Tensor, Tensor]:
        a, b = (self._mixed(p[name], p[BANK]) for name in LOGITS)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def excluding(self) -> frozenset[str]:
        return frozenset(LOGITS if self.save_only_topk_weights else ())

    def file_keys(self, site: Site) -> dict[str, str]:
        if not self.save_only_topk_weights:
            return self.keys(site)
        return {name: name for logits in LOGITS for name in (f"{logits}_topk_indices", f"{logits}_topk_weights")}

    def written(self, p: Params) -> tuple[VBLoRA, dict[str, Tensor]]:
        if not self.save_only_topk_weights:
            return self, dict(p)
        whole = next(t for most, t in _INDICES.items() if self.num_vectors < most)
        found = {}
        for name in LOGITS:
            best, indices = p[name].topk(self.topk, -1)
            found[f"{name}_topk_indices"] = indices.to(whole)
            found[f"{name}_topk_weights"] = best.softmax(-1)[..., :-1]
        return self, found

    def read(self, p: Params) -> dict[str, Tensor]:
        if not self.save_only_topk_weights:
            return dict(p)
        found = {}
        for name in LOGITS:
            weights, indices = p[f"{name}_topk_weights"], p[f"{name}_topk_indices"].long()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            logits = weights.new_full((*weights.shape[:-1], self.num_vectors), float("-inf"))
            found[name] = logits.scatter(-1, indices, weights.log())
        return found


_INDICES: Mapping[int, torch.dtype] = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32, 2**63: torch.int64}
