"""GLoRA: factors and additions for weight and bias, in chosen forms (Chavan et al. 2023, arXiv:2306.07967).

The weight is `W' = W + W * A + B`, and the bias `b' = b + b * D + E + W C`. `A` and `B` are low-rank products, vectors
of the rows, or single numbers. `C` is a low-rank product or a vector. `D` and `E` are vectors or single numbers. Each
of them may be left out. Without a low-rank `A` this is a scale, a low-rank sum and a bias; with it, the product with
the weight has a higher rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class GLoRA(WeightMethod):
    """A generalised low-rank update of the weight and the bias of linear layers.

    Args:
        r: the rank of the products.
        config_A_B: the form of `A`, which multiplies the weight, and of `B`, which is added: lora, vector, constant,
            none.
        config_C: the form of `C`, which the weight maps to an addition to the bias: lora, vector, none.
        config_D_E: the form of `D`, which multiplies the bias, and of `E`, which is added: vector, constant, none.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (glora_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.GLoRA(r=8, config_A_B="vector"))
    """

    r: int = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    bias: Literal["none", "all", "glora_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "GLORA"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def frozen(self) -> frozenset[str]:
        """Return the names of the zeros that HF PEFT keeps, in files too, for each form that is `none`."""
        return frozenset(f"glora_{letter}_zeros" for letter in "ABCDE")

    def _shapes(self, out: int, inner: int, *, biased: bool) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes by their names, with a `_` for each dot."""
        forms = {"A": self.config_A_B, "B": self.config_A_B, "C": self.config_C, "D": self.config_D_E}
        forms["E"] = self.config_D_E
        whole: dict[str, tuple[int, ...]] = {"A": (out, inner), "C": (inner, 1), "D": (out,)}
        whole |= {"B": whole["A"], "E": whole["D"]}
        found: dict[str, tuple[int, ...]] = {}
        for letter, form in forms.items():
            name, shape = f"glora_{letter}", whole[letter]
            if form == "none" or (letter in "CDE" and not biased):
                found[f"{name}_zeros"] = shape
            elif form == "lora":
                found |= {f"{name}_Xd": (shape[0], self.r), f"{name}_Xu": (self.r, shape[1])}
            else:
                found[f"{name}_X"] = (1,) if form == "constant" else (shape[0], *(1,) * (len(shape) - 1))
        return found

    def keys(self, site: Site) -> dict[str, str]:
        names = self._shapes(1, 1, biased=site.bias is not None)
        return {name: f"{name[:7]}.{name[8:]}" for name in names}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        dtype, p = adapter_dtype(base.weight.dtype), {}
        for name, shape in self._shapes(*base.weight.shape, biased=base.bias is not None).items():
            t = p[name] = base.weight.new_zeros(shape, dtype=dtype)
            if name.endswith("_zeros") or (self.init_weights and not name.endswith("_Xu")):
                continue
            if shape == (1,) and name.endswith("_X"):
                t.normal_(std=0.02, generator=rng)
            else:
                t.uniform_(-1, 1, generator=rng).mul_(shape[-1] ** -0.5)
        return p

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        weight, bias = self._deltas(base, p)
        return (y + op(x.to(weight.dtype), weight, bias)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return self.fold_over(site, base, base, p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, the base's weight is multiplied, not theirs."""
        weight, bias = self._deltas(base, p)
        return Base(under.weight + weight, None if under.bias is None or bias is None else under.bias + bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if "glora_A_Xd" in p:
            what = "a low-rank factor of each element of a weight cannot be written as scales and a low-rank sum"
            raise PeftfxError(what, site.path, "export the adapter merged; or train with config_A_B='vector'")
        q = {name: t.float() for name, t in p.items()}
        out, inner = base.weight.shape
        if "glora_A_zeros" in q:
            outer = b = a = None
        else:
            outer = (1 + q["glora_A_X"]).flatten().expand(out)
            if "glora_B_Xd" in q:
                b, a = q["glora_B_Xd"], q["glora_B_Xu"]
            else:
                b, a = q["glora_B_X"].reshape(-1, 1).expand(out, 1), outer.new_ones(1, inner)
        _, bias = self._deltas(Base(base.weight.float(), None if base.bias is None else base.bias.float()), q)
        return Update(outer=outer, a=a, b=b, bias=None if bias is None or base.bias is None else base.bias + bias)

    def _deltas(self, base: Base, p: Params) -> tuple[Tensor, Tensor | None]:
        """Return the updates that are added to the weight and to the bias."""
        a, b, c, d, e = (_made(f"glora_{letter}", p) for letter in "ABCDE")
        weight = base.weight * a + b
        return weight, None if base.bias is None else base.bias * d + e + (base.weight.to(c.dtype) @ c).squeeze(-1)


def _made(name: str, p: Params) -> Tensor:
    if f"{name}_Xd" in p:
        return p[f"{name}_Xd"] @ p[f"{name}_Xu"]
    return p[f"{name}_X"] if f"{name}_X" in p else p[f"{name}_zeros"]
