"""Bases whose linear layers are quantised in memory: by their own packages, or in layers written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from support import quantised as q
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class PackedLinear(nn.Module):
    """A layer that holds what a file has, and multiplies by the matrix that it stands for."""

    def __init__(self, own: dict[str, Tensor], weight: Tensor, bias: Tensor | None, **said: int) -> None:
        super().__init__()
        for name, tensor in own.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.bias, self.value = None if bias is None else nn.Parameter(bias), (weight,)
        vars(self).update(said)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value[0], self.bias)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with others in the places of its linear layers but the head."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, make(module))
    return model


def packed(pack: q.Pack, **said: int) -> tuple[nn.Module, nn.Module]:
    """A LLaMA of such layers, and the same in floating point."""
    random, model, plain = np.random.default_rng(0), q.tiny(num_hidden_layers=1), q.tiny(num_hidden_layers=1)
    weights: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            own, weight = pack(random, module.out_features, module.in_features)
            model.set_submodule(path, PackedLinear(own, weight, module.bias, **said))
            weights[f"{path}.weight"] = weight
    plain.load_state_dict(weights, strict=False)
    return model, plain


def bitsandbytes4(model: nn.Module, kind: str = "nf4", *, double: bool = True) -> nn.Module:
    """In 4 bits, as `load_in_4bit` does it."""
    import bitsandbytes as bnb

    def make(own: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(own.in_features, own.out_features, own.bias is not None, quant_type=kind)
        options = {"quant_type": kind, "compress_statistics": double, "module": made}
        made.weight, made.bias = bnb.nn.Params4bit(own.weight.data, requires_grad=False, **options), own.bias
        return made.to("cpu").train(own.training)

    return replaced(model, make)


def bitsandbytes8(model: nn.Module, *, late: bool = False) -> nn.Module:
    """In int8, as `load_in_8bit` does it; if `late`, with `llm_int8_has_fp16_weight`, by which calls round weights."""
    import bitsandbytes as bnb

    def make(own: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(own.in_features, own.out_features, own.bias is not None, has_fp16_weights=late)
        made.weight, made.bias = (
            bnb.nn.Int8Params(own.weight.data, requires_grad=False, has_fp16_weights=late),
            own.bias,
        )
        return made.to("cpu").train(own.training)

    return replaced(model, make)


def torchao(model: nn.Module, kind: str) -> nn.Module:
    """By `quantize_`, in one of its formats that a CPU runs."""
    from torchao import quantization as ao

    made = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "fp8": lambda: ao.Float8WeightOnlyConfig(),
        "dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    }
    ao.quantize_(model, made[kind](), filter_fn=lambda m, path: isinstance(m, nn.Linear) and path != "lm_head")
    return model


def quanto(model: nn.Module, kind: str) -> nn.Module:
    """By quanto's `quantize` and `freeze`."""
    from optimum import quanto as own

    own.quantize(model, weights=getattr(own, kind), exclude=["lm_head"])
    own.freeze(model)
    return model


class SelfDequantised(Tensor):
    """A weight of bytes and scales that every operator dequantises, as a package's own class may be."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> SelfDequantised:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[return-value]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.held, self.step = codes, scale

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"SelfDequantised({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held", "step"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> SelfDequantised:
        return SelfDequantised(inner["held"], inner["step"])

    def dequantize(self) -> Tensor:
        return self.held * self.step

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return SelfDequantised(args[0].held, args[0].step)
        return op(*pytree.tree_map_only(SelfDequantised, SelfDequantised.dequantize, args), **(kwargs or {}))


def self_dequantised(model: nn.Module) -> nn.Module:
    """With such weights in torch's own layers."""

    def make(own: nn.Linear) -> nn.Module:
        scale = own.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (own.weight.detach() / scale).round().to(torch.int8)
        own.weight = nn.Parameter(SelfDequantised(codes, scale), requires_grad=False)
        return own

    return replaced(model, make)
