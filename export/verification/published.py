"""The published arithmetic of methods, written once more for verification: of a weight, and of a layer's output.

What is here reads an adapter's tensors by HF PEFT's names and shares no code with the methods' own `forward` and
`fold`, which made the export that is verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.method import Base, Params
from peftfx.contract.weight import WeightMethod
from peftfx.methods.adalora import AdaLoRA
from peftfx.methods.ia3 import IA3
from peftfx.methods.lora import LoRA
from peftfx.methods.vera import VeRA
from peftfx.sites.site import EXPERTS

KNOWN = (LoRA, AdaLoRA, VeRA, IA3)
OnOutput = Callable[[Tensor, Tensor], Tensor]
"""A layer's adapted output, given its input and its output."""


def acting_where(method: WeightMethod, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where an aLoRA acts in a call: row by row, from the last place of its invocation on, or as the call says."""
    tokens = list(method.invoked_by)
    if not tokens:
        return {}
    ids = feed["input_ids"].tolist()
    told = feed["alora_offsets"].tolist() if "alora_offsets" in feed else [0] * len(ids)
    acts = torch.zeros(len(ids), len(ids[0]), 1, dtype=torch.bool)
    for row, (text, count) in enumerate(zip(ids, told, strict=True)):
        starts = [i for i in range(len(text)) if text[i : i + len(tokens)] == tokens]
        acts[row, min([*starts[-1:], max(len(text) - count, 0)]) :] = True
    return {"active": acts.to(feed["input_ids"].device)}


def on_output(method: WeightMethod, p: Params, kind: str) -> OnOutput | None:
    """What a method does to the output of a linear layer or an embedding; None where it is told of a weight alone."""
    if isinstance(method, IA3) and not method.feedforward:
        return lambda x, y: (y * p["ia3_l"].flatten()).to(y.dtype)
    if isinstance(method, LoRA) and not method.use_dora and "lora_A0" not in p:
        a, b = _factors(method, p)
        bias, s = p.get("lora_B_bias"), _scaling(method)
        if kind == "embedding":
            return lambda x, y: (y + s * (F.embedding(x, a.T) @ b.T)).to(y.dtype)
        return lambda x, y: (y + s * F.linear(F.linear(x.to(a.dtype), a), b, bias)).to(y.dtype)
    if isinstance(method, VeRA):
        d, scale = p["vera_lambda_d"], p["vera_lambda_b"]
        return lambda x, y: (
            y + scale * (F.linear(x.to(d.dtype), p["vera_A"][:, : x.shape[-1]]) * d @ p["vera_B"][: y.shape[-1]].T)
        ).to(y.dtype)
    if isinstance(method, AdaLoRA):
        a, b, e, s = p["lora_A"], p["lora_B"], p["lora_E"].flatten(), method.lora_alpha / (method.init_r + 1e-5)
        return lambda x, y: (y + s * F.linear(F.linear(x.to(a.dtype), a) * e, b)).to(y.dtype)
    return None


def on_weight(method: WeightMethod, start: Base, under: Base, p: Params, kind: str, groups: int) -> Base | None:
    """The adapted weight and bias, [out, in, ...]; None where the arithmetic is not known here.

    Args:
        method: a method.
        start: the weight and bias without any adapter.
        under: what adapters that act already made of them; a grouped conv may be one of a single group there.
        p: the method's parameters.
        kind: linear, conv, embedding or experts.
        groups: of a conv, at the start; of experts, how many they are.
    """
    weight, bias = under
    if isinstance(method, IA3):
        return _scaled(under, p["ia3_l"].flatten(), groups, of_input=method.feedforward)
    if isinstance(method, VeRA):
        a, b = p["vera_A"][:, : weight.shape[1]], p["vera_B"][: weight.shape[0]]
        return Base(weight + (p["vera_lambda_b"][:, None] * b) @ (p["vera_lambda_d"][:, None] * a), bias)
    if isinstance(method, AdaLoRA):
        update = p["lora_B"] @ (p["lora_E"] * p["lora_A"])
        return Base(weight + method.lora_alpha / (method.init_r + 1e-5) * update.view(start.weight.shape), bias)
    return _low_rank(method, start, under, p, kind, groups) if isinstance(method, LoRA) else None


def _low_rank(method: LoRA, start: Base, under: Base, p: Params, kind: str, groups: int) -> Base:
    """LoRA's update; DoRA's norm is of the weight at the start with it, and scales all that is there but a bias."""
    s, bias = _scaling(method), under.bias
    update = _product(*_factors(method, p), kind, groups)
    if "lora_A0" in p:
        update = update - _product(p["lora_A0"], p["lora_B0"], kind, groups)
    weight = _dense(under.weight, update) + s * update
    added = s * p["lora_B_bias"] if "lora_B_bias" in p else None
    if method.use_dora:
        alone, along = _dense(start.weight, update) + s * update, 1 if kind == "embedding" else 0
        gains = p["lora_magnitude_vector"].flatten() / alone.transpose(0, along).flatten(1).norm(dim=1)
        weight = weight * gains.view([-1 if i == along else 1 for i in range(weight.ndim)])
        added = None if added is None else gains * added
        if bias is not None:
            of_adapters = bias if start.bias is None else bias - start.bias
            bias = bias + (gains - 1) * of_adapters
    return Base(weight, bias if added is None else added if bias is None else bias + added)


def _factors(method: LoRA, p: Params) -> tuple[Tensor, Tensor]:
    """A and B; of BD-LoRA the blocks of one of them on a diagonal, and of KaSA the diagonal in A."""
    a, b, bd = p["lora_A"], p["lora_B"], method.use_bdlora or {}
    if bd.get("target_modules_bd_a"):
        a = torch.block_diag(*a.chunk(int(str(bd.get("nblocks", 1)))))
    if bd.get("target_modules_bd_b"):
        b = torch.block_diag(*b.chunk(int(str(bd.get("nblocks", 1)))))
    return (torch.diag(p["lora_diag"]) @ a if "lora_diag" in p else a), b


def _scaling(method: LoRA) -> float:
    return method.lora_alpha / (math.sqrt(method.r) if method.use_rslora else method.r)


def _scaled(base: Base, scale: Tensor, groups: int, *, of_input: bool) -> Base:
    weight, ones = base.weight, [1] * (base.weight.ndim - 2)
    if not of_input:
        return Base(weight * scale.view(-1, 1, *ones), None if base.bias is None else base.bias * scale)
    groups = 1 if weight.shape[1] == len(scale) else groups
    each = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *ones)  # a group reads its own inputs
    return Base(each.flatten(0, 1), base.bias)


def _product(a: Tensor, b: Tensor, kind: str, groups: int) -> Tensor:
    """`B A` in the shape of the weight; of a conv of several groups that of one."""
    if kind == "embedding":
        return (b @ a).T
    if kind == "linear":
        return b @ a
    if kind == EXPERTS:  # A is [experts * r, in], B is [out, r * experts]
        down = a.unflatten(0, (groups, -1))
        return torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, groups)), down)
    split = torch.einsum(
        "gor,gri->goi", b.flatten(1).unflatten(0, (groups, -1)), a.flatten(1).unflatten(0, (groups, -1))
    )
    return split.flatten(0, 1).view(b.shape[0], *a.shape[1:])


def _dense(weight: Tensor, like: Tensor) -> Tensor:
    """A grouped conv's weight as that of one group, where the update is one's."""
    groups = like.shape[1] // weight.shape[1]
    if groups == 1:
        return weight
    blocks = weight.flatten(1).unflatten(0, (groups, -1))
    whole = weight.new_zeros(groups, blocks.shape[1], groups, blocks.shape[2])
    for group in range(groups):
        whole[group, :, group] = blocks[group]
    return whole.view(like.shape)
