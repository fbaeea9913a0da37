"""What Accelerate does with a model under FSDP2 where the first process alone has its values; and other wrappings."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sharded.processes import LORA, llama, train
from sharded.work import PROMPT, message, off
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peftfx


def handed_out(folder: Path) -> dict[str, Any]:
    """What training differs from one process by, where Accelerate hands the first one's values out."""
    found: dict[str, Any] = {}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    whole = peftfx.transform(llama(), LORA, seed=0).state_dict()
    found["whole saved"] = sorted({key.partition(".")[0] for key in whole})
    for name, rule in {"lora": LORA, "prompt": PROMPT, "vera": peftfx.VeRA(r=8)}.items():
        model = _prepared(peftfx.transform(_with_buffer(), rule, seed=0))
        found[name] = off(rule, model, model)
        found[f"{name} saved"] = sorted({key.partition(".")[0] for key in model.state_dict()})
        found[f"{name} buffers"] = model.base.model.extra.tolist()  # type: ignore[union-attr, operator]
    return found


def _with_buffer() -> LlamaForCausalLM:
    """A base with a saved buffer, of which the first process has the values."""
    base = llama()
    base.model.register_buffer("extra", torch.arange(3) * (dist.get_rank() == 0))
    return base


def _prepared(model: peftfx.AdaptedModel) -> peftfx.AdaptedModel:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    first = dist.get_rank() == 0
    if not first:
        for parameter in model.parameters():
            parameter.data.zero_()
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=first,
        device=torch.device("cpu"),
    )
    try:
        return fsdp2_prepare_model(accelerator, model)  # type: ignore[arg-type, return-value]
    finally:
        del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]


def wrapped_otherwise(folder: Path) -> dict[str, str]:
    """What is said of FSDP1, ahead of transform and behind it, and of a model that is loaded tensor parallel."""
    policy = {"auto_wrap_policy": ModuleWrapPolicy({LlamaDecoderLayer}), "device_id": torch.device("cpu")}
    before = FullyShardedDataParallel(llama(), use_orig_params=True, **policy)
    found = {"before": message(lambda: peftfx.transform(before, LORA))}
    inner = peftfx.transform(llama(), peftfx.LoRA(r=2), seed=0)
    model = FullyShardedDataParallel(inner, use_orig_params=True, **policy)
    found["call"] = message(lambda: train(model, 1))
    found["save"] = message(lambda: inner.save_pretrained(folder / "none"))
    copies = peftfx.transform(llama(), LORA, seed=0)
    found["copies"] = message(lambda: FullyShardedDataParallel(copies, use_orig_params=True, **policy))
    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "base")
    dist.barrier()
    parallel = type(llama()).from_pretrained(folder / "base", distributed_config=DistributedConfig(tp_size=2))
    assert parallel.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
    found["tensor parallel"] = message(lambda: peftfx.transform(parallel, LORA))
    return found
