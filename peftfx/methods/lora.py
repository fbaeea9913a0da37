"""LoRA: a low-rank update of a weight, `W + s B A` (Hu et al. 2021, arXiv:2106.09685), and DoRA (arXiv:2402.09353).

With `x` the site's input and `y` its output, `forward` is `y + s B(A(dropout(x)))`, `s = lora_alpha / r`, or
`lora_alpha / sqrt(r)` with rsLoRA (arXiv:2312.03732). DoRA scales each output row of the updated weight to a learned
magnitude: `g (W + s B A) x + b` with `g = m / ||W + s B A||`, the norm held constant in the gradient.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from factors of `W` itself. HF PEFT subtracts these factors
from the base weight when it loads. Here the base is not changed, and the update is `s (B A - B0 A0)`, with `A0` and
`B0` the factors at the start. KaSA (arXiv:2412.06071), whose update is `s B diag(d) A`, removes a part of the weight in
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.contract.common.experts import of_experts
from peftfx.contract.common.lora.blocks import DiagonalBlocks
from peftfx.contract.common.lora.dora import (
    MAGNITUDE,
    folded,
    gain,
    rescaled,
    rescaled_apart,
    row_norms,
    unbiased,
    updated_norms,
)
from peftfx.contract.common.lora.dora_layer import is_scaled_at_once, scaled_linear
from peftfx.contract.common.lora.factors import A0, B0, B_BIAS, joined, zero_factors
from peftfx.contract.common.lora.forms import LoraForms
from peftfx.contract.common.lora.kasa import DIAG, with_diagonal
from peftfx.contract.common.lora.refusals import REFUSED, refuse_together
from peftfx.contract.common.lora.starts import begin, doubt_of, known_start, obstacle_of, starts_from_weight
from peftfx.contract.common.low_rank import A, B, dense, padding_in_peft, product
from peftfx.contract.common.patterns import refuse_ranks
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.generation.invocation import ACTIVE, refuse_no_tokens, where_active
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS, Site


@dataclass(frozen=True, kw_only=True)
class LoRA(LoraForms):
    """Low-rank adaptation of linear, conv and embedding weights.

    Args:
        r: the rank.
        lora_alpha: the numerator of the scale.
        lora_dropout: dropout on the adapter's input in training; embeddings have none, as in HF PEFT.
        use_rslora: whether the scale is `lora_alpha / sqrt(r)`.
        use_dora: whether the magnitude of each output row is learned separately from its direction (DoRA).
        rank_pattern, alpha_pattern: other values of `r` and `lora_alpha` for module paths that match a key.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (lora_only).
        lora_bias: whether B has a bias.
        init_lora_weights: True (Kaiming A, zero B), False (both random), "gaussian", "orthogonal", "pissa",
            "pissa_niter_[n]", "olora", "mica". Files of adapters that started by "eva" or "lora_ga" are read.
        target_parameters: parameters by their full names or the ends of these, as in HF PEFT: experts' stacked weights
            (`experts.down_proj`), or the `weight` of a linear layer or an embedding; in addition to the other targets.
        trainable_token_indices: tokens whose rows of the token embedding are trained, or the tokens of each embedding
            by its path; see `TrainableTokens`.
        use_bdlora: HF PEFT's `BdLoraConfig`, as a dict: which factor is block-diagonal, by patterns of paths.
        kasa_config: HF PEFT's `KasaConfig`, as a dict: the `r` smallest singular values of the weight are removed, and
            a trained diagonal is between the factors. As in HF PEFT, users add KaSA's losses themselves.
        alora_invocation_tokens: the adapter acts only from the last occurrence of these tokens in a row's text on
            (aLoRA, arXiv:2504.12397). Before them the row, and its cache, are the base's. Only for linear layers in
            causal models.
        ensure_weight_tying: whether a trained copy in `modules_to_save` (`embed_tokens`, `lm_head`) is one for all
            modules that share the tensor, as in HF PEFT.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LoRA(r=8, lora_alpha=16, target="attention | mlp"))
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    alora_invocation_tokens: Sequence[int] | None = None
    use_bdlora: Mapping[str, object] | None = None
    kasa_config: Mapping[str, object] | None = None
    ensure_weight_tying: bool = False

    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[frozenset[str]] = frozenset({*WEIGHT_KINDS, EXPERTS})
    wraps_attention: ClassVar[bool] = True
    default_target: ClassVar[str] = "attention.query | attention.value"
    ignored: ClassVar[frozenset[str]] = frozenset({"eva_config", "lora_ga_config", "corda_config", "loftq_config"})
    refused: ClassVar[Mapping[str, str]] = REFUSED

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ranks(self.r, self.rank_pattern, "LoRA")
        object.__setattr__(self, "init_lora_weights", known_start(self.init_lora_weights))
        refuse_together(self.use_dora, self.alora_invocation_tokens, self.use_bdlora, self.kasa_config)
        if self._linear_alone and self.init_lora_weights not in (True, False, "gaussian"):
            what = f"{self.init_lora_weights!r} is no start of a variant of LoRA that acts at linear layers alone"
            raise PeftfxError(what, "init_lora_weights", "True, False or 'gaussian'")
        if self.alora_invocation_tokens is not None:
            refuse_no_tokens(self.invoked_by)

    @property
    def neutral(self) -> bool:
        return self.init_lora_weights is not False and self.kasa_config is None

    @property
    def invoked_by(self) -> tuple[int, ...]:
        return tuple(self.alora_invocation_tokens or ())

    def acts_at(self, site: Site) -> bool:
        able = site.kind == "linear" or not self._linear_alone
        return super().acts_at(site) and able and DiagonalBlocks.allows(self.use_bdlora, site.path)

    @property
    def _linear_alone(self) -> bool:
        """Whether this is a variant that acts only at linear layers."""
        return any(given is not None for given in (self.alora_invocation_tokens, self.use_bdlora, self.kasa_config))

    @property
    def replaces(self) -> bool:
        return self.use_dora

    @property
    def adds(self) -> bool:
        return not self.use_dora and not self.invoked_by

    @property
    def unfoldable(self) -> str:
        return "an aLoRA acts behind its invocation tokens alone, and no weight does that" if self.invoked_by else ""

    @property
    def attention_rank(self) -> int | None:
        return None if self.use_dora or self._linear_alone else self.r

    @property
    def obstacle(self) -> PeftfxError | None:
        return obstacle_of(self.init_lora_weights, (self.r, *self.rank_pattern.values()))

    @property
    def doubt(self) -> str:
        return doubt_of(self.init_lora_weights)

    def frozen(self) -> frozenset[str]:
        return frozenset({A0, B0, B} if self.init_lora_weights == "mica" else {A0, B0})

    def keys(self, site: Site) -> dict[str, str]:
        if site.kind == "embedding" and not self._at_parameter(site):
            names = {A: "lora_embedding_A", B: "lora_embedding_B"}
        else:
            names = {A: "lora_A.weight", B: "lora_B.weight"}
        if self.lora_bias:
            names[B_BIAS] = "lora_B.bias"
        if self.use_dora:
            names[MAGNITUDE] = "lora_magnitude_vector"
        if self.kasa_config is not None:
            names[DIAG] = "lora_diag"
        return names

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if not self.acts_at(site):
            what = f"this variant of LoRA acts at linear layers, not at a {site.kind}"
            raise PeftfxError(what, site.path, "exclude this module")
        if self.lora_bias and site.kind == "embedding":
            raise PeftfxError("an embedding has no place for lora_bias", site.path, "leave embeddings out of this rule")
        p = zero_factors(site, base.weight, self.r)
        if self.blocks is not None:
            self.blocks.cut(p, site.path)
        begin(self.init_lora_weights, site, base.weight, p, self.scaling, rng, bare=self._at_parameter(site))
        if self.kasa_config is not None:
            p = with_diagonal(site, base.weight, p, self.scaling, rng)
        if self.lora_bias:
            p[B_BIAS] = p[B].new_zeros(len(base.weight))
        if self.use_dora:
            p[MAGNITUDE] = row_norms(site, base.weight.to(p[A].dtype))
        return p

    def past_start(self, p: Params) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p[name]) for name in (A0, B0) if name in p and bool(p[name].any())}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        p = self.set_out(p)
        drops = training and self.lora_dropout > 0 and site.kind != "embedding"
        if y is None:
            if training and not drops and self._scales_at_once(site, x, base, p):
                return scaled_linear(x, *base, p[A], p[B], p[MAGNITUDE], self.scaling)
            y = op(x, *base)
        dtype, rounds = y.dtype, y.element_size() < 4 or y.dtype != p[A].dtype
        inner = x if site.kind == "embedding" or x.dtype == p[A].dtype else x.to(p[A].dtype)
        dropped = F.dropout(inner, self.lora_dropout, training=True) if drops else inner
        delta = self._delta(site, op, dropped, p[A], p[B], p.get(B_BIAS), rounds=rounds)
        start = self._delta(site, op, inner, p[A0], p[B0], None, rounds=rounds) if A0 in p else None
        if self.invoked_by:
            delta = where_active(delta, p[ACTIVE])
        update, left = delta if start is None else delta - start, self.scaling if rounds else 1
        if not self.use_dora:
            return (y + _times(left, update)).to(dtype) if rounds else y + update
        gains = gain(p[MAGNITUDE], self._norms(site, base.weight, p, rounds=rounds))
        if drops:
            bare = op(dropped, base.weight.to(dropped.dtype))
            if start is not None:  # HF PEFT's base is without s B0 A0, so dropout does not reach that part
                begun = self._delta(site, op, dropped, p[A0], p[B0], None, rounds=rounds)
                y, update = y + left * (begun - start), delta - begun
            return rescaled_apart(site, y, bare, gains, update, left).to(dtype)
        if rounds:
            return rescaled_apart(site, y, unbiased(site, y, base.bias), gains, update, left).to(dtype)
        return rescaled(site, y, base.bias, gains, update).to(dtype)

    def _delta(
        self, site: Site, op: Op, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, *, rounds: bool
    ) -> Tensor:
        """Return `B(s A(x))` in the adapter's precision, the scale where that costs least; without it if `rounds`.

        `rounds` says that sums are rounded to half precision, or to another precision than the adapter's: by the base,
        the adapter or autocast. There the scale comes last, as in HF PEFT, so that training takes the same steps.
        """
        scale = 1 if rounds else self.scaling
        if site.kind == "embedding":
            return F.linear(_times(scale, op(x, a.T)), b)
        if site.kind == EXPERTS:
            down, up = of_experts(site.shape[0], a, b)
            return op(_times(scale, op(x, down)), up)
        low, bias = _times(scale, op(x, a)), None if bias is None else _times(scale, bias)
        if site.kind == "linear":
            return F.linear(low, b, bias)
        return (F.conv1d, F.conv2d, F.conv3d)[b.ndim - 3](low, b, bias, groups=site.groups)

    def _updated(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """Return `W + s (B A - B0 A0)`, as a dense weight for a conv of several groups."""
        if self._in_one_pass(site, weight, p):
            return torch.addmm(weight, p[B], p[A], alpha=self.scaling)
        if site.kind == EXPERTS and A0 not in p and weight.dtype == p[A].dtype:
            down, up = of_experts(site.shape[0], p[A], p[B])
            return torch.baddbmm(weight, up, down, alpha=self.scaling)
        return self._sum(site, weight, p)

    def _sum(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """Return the updated weight, as `_updated` does, from an update that is computed by itself."""
        update = product(site, p[A], p[B])
        if A0 in p:
            update = update - product(site, p[A0], p[B0])
        groups = 1 if weight.shape[1] == p[A].shape[1] else site.groups  # another adapter may have made it dense
        return dense(weight, groups) + self.scaling * update.to(p[A].dtype)  # under autocast it is in half precision

    def _norms(self, site: Site, weight: Tensor, p: Params, *, rounds: bool) -> Tensor:
        """Return the norms of the updated weight's output rows, as constants in the gradient."""
        if not rounds and self._in_one_pass(site, weight, p):
            return updated_norms(weight.detach(), p[A].detach(), p[B].detach(), self.scaling)
        return row_norms(site, self._sum(site, weight, p)).detach()

    @staticmethod
    def _scales_at_once(site: Site, x: Tensor, base: Base, p: Params) -> bool:
        """Whether DoRA's layer is one operation on the base's weight and the two factors."""
        return site.kind == "linear" and not {A0, B_BIAS} & p.keys() and is_scaled_at_once(x, *base, p[A])

    @staticmethod
    def _in_one_pass(site: Site, weight: Tensor, p: Params) -> bool:
        """Return whether the updated weight is computed in one pass over the weight."""
        return site.kind == "linear" and A0 not in p and weight.dtype == p[A].dtype

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return self.fold_over(site, base, base, p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        p = self.set_out(p)
        weight = self._updated(site, under.weight, p)
        if not self.use_dora:
            return Base(weight, self._bias(under.bias, None, p))
        alone = weight if under is base else self._updated(site, base.weight, p)
        gains = gain(p[MAGNITUDE], row_norms(site, alone))
        weight, bias = folded(site, base, under, weight, gains)
        return Base(weight, self._bias(bias, gains, p))

    def by_row(self, site: Site) -> frozenset[str] | None:
        return frozenset({B, B0, B_BIAS, MAGNITUDE}) if site.kind == "linear" and self.blocks is None else None

    def _bias(self, bias: Tensor | None, gains: Tensor | None, p: Params) -> Tensor | None:
        """Return the base's bias plus the bias of `B`."""
        if B_BIAS not in p:
            return bias
        added = self.scaling * p[B_BIAS] * (1 if gains is None else gains)
        return added if bias is None else bias + added

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if self.unfoldable:
            raise PeftfxError(self.unfoldable, site.path, "export the adapter: the exported graph has its operations")
        if site.kind == EXPERTS:
            what = "LoRA on experts' weights cannot be put into a running graph"
            raise PeftfxError(what, site.path, "export the adapter merged")
        q = self.set_out({name: t.float() for name, t in p.items()})
        both, gains = (joined(q) if A0 in q else q), None
        b = self.scaling * dense(both[B], site.groups).flatten(1)
        if self.use_dora:
            weight = self._updated(site, base.weight.float(), q)
            gains = gain(q[MAGNITUDE], row_norms(site, weight))
            b = gains[:, None] * b
        bias = self._bias(base.bias, gains, q)
        return Update(outer=gains, a=both[A], b=b, bias=None if bias is base.bias else bias)

    def changes_nothing(self, saved: Mapping[str, Tensor]) -> bool:
        changes_base = self.use_dora or self.kasa_config is not None
        if changes_base or self.init_lora_weights not in (True, False, "gaussian"):
            return False
        pairs = [(saved[name], saved.get(name.replace("_A", "_B"))) for name in saved if "_A" in name]
        own = not any(bool(tensor.any()) for name, tensor in saved.items() if name.endswith(".bias"))
        return bool(pairs) and own and not any(b is None or bool(a.any() and b.any()) for a, b in pairs)

    def apart_from_peft(self, site: Site, module: nn.Module) -> str:
        if site.kind != "conv":
            return ""
        if any(step != 1 for step in getattr(module, "dilation", ())):
            return "its forward leaves the conv's dilation out, until it is merged"
        if self.use_dora and site.groups > 1:
            return "at a grouped conv DoRA divides by the norms of another matrix than the update"
        return padding_in_peft(module)

    def moves_weight_in_peft(self, site: Site) -> bool:
        return self.kasa_config is not None or (starts_from_weight(self.init_lora_weights) and site.kind != "embedding")


def _times(scale: float, value: Tensor) -> Tensor:
    """Return `scale * value`. A scale of 1 is left out: at one token, a product with a number costs more than a sum."""
    return value if scale == 1 else scale * value
