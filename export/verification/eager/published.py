"""The published arithmetic of methods, written a second time for verification: on weights, and on layers' outputs.

This module reads an adapter's tensors by HF PEFT's names. It shares no code with the methods' own `forward` and `fold`,
which made the export that is verified.
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
"""A function that returns a layer's adapted output, given the layer's input and output."""


def acting_where(method: WeightMethod, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return where an aLoRA acts in each row of a call: from its last invocation on, or from the given offset on."""
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
    """Return what a method does to a layer's output, as a function; None if it is defined only on weights."""
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
    """Compute the adapted weight and bias, [out, in, ...]. Return None for a method that this module does not know.

    Args:
        method: the method.
        start: the weight and bias of the base.
        under: the weight and bias after the adapters that acted before. A grouped conv may have been turned into a conv
            of one group.
        p: the method's parameters.
        kind: `linear`, `conv`, `embedding` or `experts`.
        groups: the number of groups of the base's conv, or the number of experts.
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
    """Add LoRA's update. DoRA's norm is of the base's weight plus the update; it scales all but the base's bias."""
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
    """Return A and B. BD-LoRA puts the blocks of one of them on a diagonal; KaSA's diagonal is multiplied into A."""
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
    each = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *ones)  # each group reads its own inputs
    return Base(each.flatten(0, 1), base.bias)


def _product(a: Tensor, b: Tensor, kind: str, groups: int) -> Tensor:
    """Return `B A` in the shape of the weight. For a grouped conv, the shape is that of a conv of one group."""
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
    """Return a grouped conv's weight as the weight of one group if the update has one group."""
    groups = like.shape[1] // weight.shape[1]
    if groups == 1:
        return weight
    blocks = weight.flatten(1).unflatten(0, (groups, -1))
    whole = weight.new_zeros(groups, blocks.shape[1], groups, blocks.shape[2])
    for group in range(groups):
        whole[group, :, group] = blocks[group]
    return whole.view(like.shape)
