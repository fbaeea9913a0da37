"""Train an adapter under Accelerate, and export it.

accelerate launch --num_processes 2 examples/accelerate_launch.py OUT

On CPUs that starts one process; two are started by
torchrun --nproc-per-node 2 examples/accelerate_launch.py OUT
FSDP2 on GPUs: --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP.
`python examples/accelerate_launch.py` runs it in one process.
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx

torch.set_num_threads(1)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
out = Path(broadcast_object_list([sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()])[0])

set_seed(0)
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **size))
adapted = peftfx.transform(base, peftfx.LoRA(r=4, target="all-linear"), seed=0)

row = torch.randint(3, 64, (10,))
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row}] * 48, batch_size=2)
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
model, optimizer, loader = accelerator.prepare(adapted, optimizer, loader)

losses = []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]

# Under FSDP2 every process calls what gathers weights; under DDP each has them all, and one is enough.
trained = accelerator.unwrap_model(model)
sharded = accelerator.distributed_type == "FSDP"
if sharded or accelerator.is_main_process:
    trained.save_pretrained(out / "adapter", is_main_process=accelerator.is_main_process)
    report = trained.export(out / "onnx")
    accelerator.print(f"{accelerator.num_processes} processes: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    accelerator.print(report)
accelerator.wait_for_everyone()
accelerator.end_training()
