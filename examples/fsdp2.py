"""Train an adapter on a base of which each process has a part (FSDP2); save, merge and export it.

torchrun --nproc-per-node 2 examples/fsdp2.py OUT

Without torchrun it runs in one process, which then has all parts.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx

torch.set_num_threads(1)
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
    os.environ.setdefault(name, value)
device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]) else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, count = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device, (count,))

# One directory for all processes.
shared = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()] if rank == 0 else [None]
dist.broadcast_object_list(shared)
out = Path(shared[0])

# Tiny and random, the same in every process; yours comes from from_pretrained.
torch.manual_seed(0)
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **size))
adapted = peftfx.transform(model, peftfx.LoRA(r=4, target="all-linear"), seed=0)

# The adapter's parameters are children of the base's modules: they are sharded with their layer.
for layer in adapted.base.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(adapted, mesh=mesh)

optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
batches = torch.randint(3, 64, (12, 4 * count, 10), generator=torch.Generator().manual_seed(1))
first = last = 0.0
for step, batch in enumerate(batches[:1].expand(12, -1, -1)):
    ids = batch[rank::count].to(device)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    last = loss.item()
    first = last if step == 0 else first
assert last < first

# Each of these gathers one weight at a time. Every process calls them; rank 0 writes.
adapted.save_pretrained(out / "adapter")
report = adapted.export(out / "onnx")
merged = adapted.merge()
if rank == 0:
    print(f"{count} processes: loss {first:.3f} to {last:.3f}")
    print(report)
    print(merged)
dist.destroy_process_group()
