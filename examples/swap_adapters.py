"""Two classifiers that `peft` trained, each with a head of its own, as files for one graph of their base.

    python examples/swap_adapters.py [DIRECTORY]

The base is a tiny random BERT, so that this runs in seconds; use a directory of your own in earnest. The command line
does the same: `peftfx export --swappable`, `peftfx export-adapter`, `peftfx run --adapter`.
"""

import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

import peftfx

torch.manual_seed(0)
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
base = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=2, **size)).eval()
text = {name: torch.randint(1, 2, (3, 9)) for name in ("attention_mask", "token_type_ids")}
text["input_ids"] = torch.randint(64, (3, 9))

root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
base.save_pretrained(root / "base")
want = {}
for name, config in (("lora", peft.LoraConfig(task_type="SEQ_CLS")), ("ia3", peft.IA3Config(task_type="SEQ_CLS"))):
    trained = peft.get_peft_model(BertForSequenceClassification.from_pretrained(root / "base"), config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:  # as if it had been trained
                parameter.add_(0.2 * torch.randn_like(parameter))
        want[name] = trained(**text).logits
    trained.save_pretrained(root / name)

peftfx.export_onnx(base, root / "graph", slots="all-linear", view="forward")
weights = root / "graph" / "model.onnx.data"
for name in want:
    adapted = peftfx.load(base, root / name)
    path = peftfx.export_adapter(adapted, root / "graph", root / name)
    adapted.remove()
    print(f"{path.name}: {path.stat().st_size:,} bytes; the base's weights: {weights.stat().st_size:,}")

served = peftfx.runtime.load(root / "graph")
for name, logits in want.items():
    served.load_adapter(root / f"{name}.onnx_adapter")
    print(name, float((served(**text).logits - logits).abs().max()))
    assert torch.allclose(served(**text).logits, logits, atol=1e-4)
