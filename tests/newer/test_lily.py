"""Lily's factors are shared by layers as HF PEFT shares them; what no weight does is exported beside it."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.testing.models import Causal
from peftfx.testing.setup import stir

BASE = Causal((), layers=3, groups=2).build()
IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
OPTIONS = {"r": 3, "stride_A": 2, "num_B": 3, "target_modules": ["q_proj", "v_proj"]}


def outputs(model: nn.Module) -> Tensor:
    return model(**CALL).logits


def test_layers_share_factors_as_in_hf_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(BASE), peft.LilyConfig(**OPTIONS)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftfx.load(copy.deepcopy(BASE), tmp_path / "theirs", inputs=CALL).eval()
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=1e-5, rtol=1e-5)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    grads = []
    for model in (ours, theirs):
        outputs(model).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).sort()[0])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    torch.testing.assert_close(one, other)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(read), outputs(ours), atol=1e-5, rtol=1e-5)
    other["base_model.model.model.layers.1.self_attn.q_proj.lily_A.weight"] += 1
    save_file(other, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(PeftfxError, match="one shared tensor"):
        peftfx.load(copy.deepcopy(BASE), tmp_path / "theirs", inputs=CALL)


@pytest.mark.slow
def test_roles_share_by_the_names_that_files_have(tmp_path: Path) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "target_modules"}
    rule = peftfx.Lily(**options, target="attention.query | attention.value")
    ours = peftfx.transform(copy.deepcopy(BASE), rule, inputs=CALL, seed=2).eval()
    stir(ours.adapter("default"), 1)
    ours.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path).eval()
    torch.testing.assert_close(outputs(read), outputs(ours), atol=1e-5, rtol=1e-5)
    some = peftfx.transform(copy.deepcopy(BASE), f"{rule.peft_type.lower()}(r=2)@/.*[01].*(q|v)_proj/", inputs=CALL)
    with pytest.raises(PeftfxError, match="by the ends of module names"):
        some.save_pretrained(tmp_path / "some")


def test_it_is_exported_beside_the_weights_and_merged_into_none(tmp_path: Path) -> None:
    adapted = peftfx.transform(copy.deepcopy(BASE), peftfx.Lily(**OPTIONS), inputs=CALL, seed=2).eval()
    stir(adapted.adapter("default"), 1)
    adapted.add_adapter("plain", peftfx.LoRA(r=2, target_modules=["q_proj", "o_proj"]))
    stir(adapted.adapter("plain"), 2)
    adapted.set_adapter(["default", "plain"])
    report = adapted.export(tmp_path / "onnx", view="forward")  # verified in ONNX Runtime
    assert {path.rpartition(".")[2] for path in report.merged} == {"q_proj", "o_proj"}
    for act in (adapted.merge, lambda: adapted.convert_to_lora("default", 2)):
        with pytest.raises(PeftfxError, match=r"mean over all tokens|does not update weights"):
            act()
    with pytest.raises(PeftfxError, match="neither a scale nor a low-rank sum"):
        adapted.export(tmp_path / "rows", view="forward", batched=["default", "plain"])
