"""Two processes that compute together, over gloo, and a tiny LLaMA that they train."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.captures import remembering
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx.sharding import processes
from peftfx.sharding.parts import full
from peftfx.views import capture

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LORA = peftfx.LoRA(r=4, target="all-linear", modules_to_save=["lm_head"])
WAYS = ("before", "adapted", "base", "layers")  #: layers ahead of transform, or after it, with a root or none


def in_two(work: Callable[..., Any], folder: Path, *args: object) -> list[Any]:
    """What a function returns in each of two processes."""
    mp.spawn(_run, (work, folder, args), nprocs=2)  # type: ignore[no-untyped-call]
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(2)]


def _run(rank: int, work: Callable[..., Any], folder: Path, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder / 'store'}", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    processes.PATIENCE = datetime.timedelta(seconds=20)
    capture._captured = remembering()
    result = work(folder, *args)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def llama(*, tied: bool = False, biases: bool = False) -> LlamaForCausalLM:
    """The same in every process."""
    torch.manual_seed(0)
    own = {"tie_word_embeddings": tied, "attention_bias": biases}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **own, **SIZE))


def two() -> DeviceMesh:
    """Both processes."""
    return init_device_mesh("cpu", (2,))


def adapted(rule: object, way: str, seed: int = 0) -> peftfx.AdaptedModel:
    """A model of which each process has a part."""
    base, mesh = llama(), two()
    made = None if way == "before" else peftfx.transform(base, rule, seed=seed)
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if way in ("base", "adapted"):
        fully_shard(base if way == "base" else made, mesh=mesh)  # type: ignore[type-var]
    return made or peftfx.transform(base, rule, seed=seed)


def train(model: nn.Module, steps: int = 3, rank: int | None = None, optimizer: Any = None) -> Tensor:
    """Losses of some steps: of a process its half of each batch."""
    model.train()
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2) if optimizer is None else optimizer
    losses = []
    for batch in torch.randint(3, 64, (steps, 4, 10), generator=torch.Generator().manual_seed(1)):
        ids = batch if rank is None else batch[2 * rank : 2 * rank + 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean_of_all(value: Tensor) -> Tensor:
    """Of both processes."""
    total = value.clone()
    dist.all_reduce(total)
    return total / 2


def whole_state(model: peftfx.AdaptedModel) -> dict[str, Tensor]:
    """The adapters' tensors, gathered."""
    return {name: full(tensor.detach()).clone() for name, tensor in model.state_dict().items()}
