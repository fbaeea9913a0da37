"""Train under transformers.Trainer: its checkpoints hold the adapter alone, and it resumes from them."""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftfx

torch.set_num_threads(1)
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def build() -> peftfx.AdaptedModel:
    """The same base, with a fresh adapter, each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **size))
    return peftfx.transform(model, peftfx.LoRA(r=4, target="attention.query | attention.value"), seed=0)


def trainer_of(adapted: peftfx.AdaptedModel, steps: int) -> Trainer:
    """A trainer for `steps` steps that saves every fourth."""
    rows = torch.randint(3, 64, (64, 10), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {"save_steps": 4, "logging_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(
        out / "run", max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant", seed=0, **options
    )
    return Trainer(model=adapted, args=arguments, train_dataset=data)


# Eight steps in one go; and four, then four more from the checkpoint, on a base and an adapter made anew.
straight = build()
trainer_of(straight, 8).train()

trainer_of(build(), 4).train()
resumed = build()
trainer = trainer_of(resumed, 8)
trainer.train(resume_from_checkpoint=str(out / "run" / "checkpoint-4"))

torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), atol=1e-5, rtol=1e-5)
print("resumed training ends where one run ends")

# Trainer's own files hold the state of the adapters, by name; save_pretrained writes HF PEFT's.
trainer.save_model(out / "final")
saved = load_file(out / "final" / "model.safetensors")
assert all(name.startswith("adapters.default.") for name in saved)
print(f"save_model: {len(saved)} tensors, {sum(t.numel() for t in saved.values()):,} numbers: the adapter alone")
resumed.save_pretrained(out / "adapter")
print("save_pretrained:", ", ".join(sorted(path.name for path in (out / "adapter").iterdir())))
