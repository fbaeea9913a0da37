"""`torch.nn.MultiheadAttention` in HF PEFT's files: one adapter for its input projection and its output projection.

HF PEFT's LoRA on the attention at `a` is `a.lora_A` and `a.lora_B` for the input projection (query, key and value in
one weight), and `a.base_layer.out_proj.lora_A` and `.lora_B` for the output projection. In a graph these are two sites.

HF PEFT (0.21.2 and earlier) adds the update of the output projection twice, in each call and in a merge: once itself
and once by the layer's own merge. Adapters were trained with this factor, so B is here twice what the file has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peftfx.adapters.files.names import name_of
from peftfx.adapters.files.parameters import parameter_path
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.rules.torch_attention import IN_PROJ, OUT_PROJ, wrapper_of


def path_in_file(base: nn.Module, method: Method, path: str, known_as: str = "") -> str:
    """Return a site's module path in HF PEFT's keys: `known_as`, if the placement has one."""
    if known_as:
        return known_as
    owner = wrapper_of(base, method, path)
    if owner is None:
        return parameter_path(base, method, path)
    return owner if path.endswith(IN_PROJ) else name_of(owner, f"base_layer.{OUT_PROJ}")


def times_in_use(base: nn.Module, method: Method, path: str, suffix: str) -> float:
    """Return the factor between a tensor of the file with this suffix and the tensor that acts at the site."""
    doubled = suffix.startswith("lora_B") and path.endswith(OUT_PROJ) and wrapper_of(base, method, path) is not None
    return 2.0 if doubled else 1.0


def by_wrapper(base: nn.Module, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return the methods of sites by the paths of the modules that HF PEFT adapts.

    Raises:
        PeftfxError: the two projections of an attention have different options, or options that HF PEFT has not.
    """
    found: dict[str, Method] = {}
    for path, method in methods.items():
        owner = wrapper_of(base, method, path)
        if owner is not None and (found.get(owner, method) != method or method.attention_rank is None):
            what = (
                "HF PEFT has one rank and one alpha for both projections of a torch.nn.MultiheadAttention, and no DoRA"
            )
            raise PeftfxError(what, owner, "adapt both by one rule, or export the adapter merged")
        found[path if owner is None else owner] = method
    return found


@torch.no_grad()
def other_projections(base: nn.Module, methods: Mapping[str, Method], like: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return tensors for the projections that are not adapted but that HF PEFT's files have beside adapted ones."""
    tensor = next(iter(like), torch.empty(0))
    found: dict[str, Tensor] = {}
    for path, method in methods.items():
        owner = wrapper_of(base, method, path)
        other = {IN_PROJ: OUT_PROJ, OUT_PROJ: IN_PROJ}.get(path.rpartition(".")[2], "")
        rank = method.attention_rank
        if owner is None or rank is None or f"{owner}.{other}".removeprefix(".") in methods:
            continue
        attention = base.get_submodule(owner)
        assert isinstance(attention, nn.MultiheadAttention)
        weight = attention.in_proj_weight if other == IN_PROJ else attention.out_proj.weight
        assert isinstance(weight, Tensor)
        name = path_in_file(base, method, name_of(owner, other))
        a = torch.empty(rank, weight.shape[1], dtype=tensor.dtype)
        found[f"{name}.lora_A.weight"] = nn.init.kaiming_uniform_(a, 5**0.5)
        found[f"{name}.lora_B.weight"] = torch.zeros(weight.shape[0], rank, dtype=tensor.dtype)
    return found
