"""An adapter that HF PEFT wrote becomes one merged ONNX model with HF PEFT's own numbers."""

import copy
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import peftfx
from peftfx.export import OnnxModel

torch.manual_seed(0)
torch.set_num_threads(1)
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# peft trains an adapter (here: random values stand for training) and saves it.
base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
config = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["c_attn", "c_fc"])
theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
theirs.save_pretrained(str(out / "adapter"))

# peftfx reads it. The adapted model computes what peft's does, before and after the merge.
adapted = peftfx.load(base, out / "adapter")
print(f"{len(adapted.sites)} sites in the model, {len(adapted.adapter('default').placements)} of them adapted")
report = adapted.export(out / "onnx", view="forward", force=True)

ids = torch.randint(0, 64, (3, 11))
with torch.no_grad():
    want = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    in_torch = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
in_ort = OnnxModel(out / "onnx")(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
print(f"peftfx in torch against peft: {(in_torch - want).abs().max():.1e}")
print(f"ONNX Runtime against peft:    {(in_ort - want).abs().max():.1e}")
torch.testing.assert_close(in_torch, want, atol=1e-5, rtol=0)
torch.testing.assert_close(in_ort, want, atol=1e-4, rtol=0)
