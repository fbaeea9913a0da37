"""Train LoRA in a plain loop, save it, export it merged, and serve it in ONNX Runtime.

The model is tiny and random and so is its text, so that this runs anywhere in seconds: use your own.
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from transformers import BertConfig, BertForSequenceClassification

import peftfx

torch.manual_seed(0)
torch.set_num_threads(1)
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# A base model, and a task: is there a token 7 in the sentence?
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=2, **size))
ids = torch.randint(8, 40, (128, 9))
labels = torch.arange(128) % 2
ids[labels == 1, 4] = 7
mask = torch.ones_like(ids)

# Only the adapter and the new head are trained. The base keeps its parameters: they are shared, never copied.
rule = peftfx.LoRA(r=4, lora_alpha=8, target="attention | mlp", modules_to_save=["classifier"])
adapted = peftfx.transform(model, rule, seed=0)
adapted.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
adapted.train()
for epoch in range(8):
    total = 0.0
    for rows in torch.randperm(len(ids)).split(16):
        loss = adapted(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() / 8
    print(f"epoch {epoch}: loss {total:.3f}")
adapted.eval()

# The adapter alone, as HF PEFT saves it; and one ONNX model, verified against torch before it appears. Its inputs are
# those of the call given here; without one, those that the model's config asks for (BERT's token types too).
adapted.save_pretrained(out / "adapter")
call = {"input_ids": ids[:2], "attention_mask": mask[:2]}
report = adapted.export(out / "onnx", inputs=call, force=True)
print(f"merged {len(report.merged)} sites; ONNX Runtime = torch to {report.max_abs:.1e}")

session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
(served,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
with torch.no_grad():
    logits = adapted(input_ids=ids, attention_mask=mask).logits
torch.testing.assert_close(torch.from_numpy(served), logits, atol=1e-4, rtol=1e-4)
print(f"accuracy in ONNX Runtime: {(served.argmax(-1) == labels.numpy()).mean():.0%}")
