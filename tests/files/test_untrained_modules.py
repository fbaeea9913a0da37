"""Adapters whose files have tensors for modules that the call does not run, as they were made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, runtime

pytestmark = pytest.mark.further

IDS = torch.tensor([[5, 9, 11, 4, 7], [8, 3, 2, 6, 1]])
ENCODED = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "LoRA": peft.LoraConfig(target_modules="all-linear", r=4),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "VeRA": peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
    "VeRA without its matrices": peft.VeraConfig(
        target_modules=["q_proj", "v_proj"], r=4, save_projection=False, task_type="CAUSAL_LM"
    ),
    "PVeRA": peft.PveraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
    "DoRA": peft.LoraConfig(target_modules="all-linear", r=4, use_dora=True),
    "PiSSA": peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights="pissa"),
    "LoHa": peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=3),
    "OFT": peft.OFTConfig(target_modules=["q_proj", "v_proj"], r=0, oft_block_size=4),
    "HRA": peft.HRAConfig(target_modules=["q_proj", "v_proj"], r=4),
    "ROAD": peft.RoadConfig(target_modules=["q_proj", "v_proj"], group_size=4),
    "WaveFT": peft.WaveFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=20),
    "WaveFT in proportion": peft.WaveFTConfig(
        target_modules=["q_proj", "v_proj", "fc1"], n_frequency=20, proportional_parameters=True
    ),
    "LNTuning": peft.LNTuningConfig(target_modules=["self_attn_layer_norm", "encoder_attn_layer_norm"]),
}


def _decoder() -> nn.Module:
    """A decoder with attention to an encoder's states, which a call with token ids alone does not run."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    tokens = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return hf.BartForCausalLM(hf.BartConfig(**sizes, **tokens, max_position_embeddings=64, is_decoder=True)).eval()


def _trained(base: nn.Module, config: peft.PeftConfig, directory: Path, *, everywhere: bool = False) -> nn.Module:
    """An adapter that training changed where a call with token ids alone runs, or everywhere."""
    made = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if tensor.requires_grad and (everywhere or "encoder_attn" not in name):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    made.save_pretrained(str(directory))
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_kept_and_an_export_without_them_says_so(config: peft.PeftConfig, tmp_path: Path) -> None:
    base = _decoder()
    theirs = _trained(base, config, tmp_path / "adapter")
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "adapter")
    with torch.no_grad():
        want = theirs(input_ids=IDS[:1, :3]).logits
        torch.testing.assert_close(ours(input_ids=IDS[:1, :3]).logits, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(want, base(input_ids=IDS[:1, :3]).logits, atol=1e-3)
    ours.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    ours.export(tmp_path / "onnx", view="decode")
    report = json.loads((tmp_path / "onnx" / "peftfx_report.json").read_text(encoding="utf-8"))
    assert any("encoder_attn" in str(value) for value in report.values())
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(runtime.load(tmp_path / "onnx").generate(IDS, **how), theirs.generate(input_ids=IDS, **how))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_trained_biases_of_layers_whose_results_are_unused_are_taken_from_inside(
    options: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = hf.BigBirdForCausalLM(hf.BigBirdConfig(vocab_size=99, is_decoder=True, **sizes)).eval()
    config = peft.LoraConfig(
        target_modules="all-linear", r=4, bias="all", **options
    )  # of the pooler too, which is idle
    theirs = _trained(base, config, tmp_path / "adapter", everywhere=True)
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "adapter")
    ours.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again"))
    first, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    name = "base_model.model.bert.pooler.base_layer.bias"
    assert torch.equal(first[name], saved[name])
    with torch.no_grad():
        want = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_call_that_runs_them_is_computed_in_modules_and_refused_in_a_graph(tmp_path: Path) -> None:
    base = _decoder()
    theirs = _trained(base, CONFIGS["LoRA"], tmp_path)
    call: dict[str, Tensor] = {"input_ids": IDS, "encoder_hidden_states": ENCODED}
    ours = peftfx.load(copy.deepcopy(base), tmp_path)
    for model in (ours, theirs):
        model(**call).logits.square().mean().backward()
    torch.testing.assert_close(ours(**call).logits, theirs(**call).logits, atol=1e-5, rtol=1e-5)
    norms = [sorted(float(p.grad.norm()) for p in m.parameters() if p.grad is not None) for m in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    with pytest.warns(UserWarning, match=r"this call does not run the modules of .*encoder_attn"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path, road="graph")
    with pytest.raises(PeftfxError, match="left out of the adapter") as refused:
        ours(**call)
    assert "load the adapter with inputs= of a call that uses them" in str(refused.value)
    ours = peftfx.load(copy.deepcopy(base), tmp_path, inputs=call)
    with torch.no_grad():
        torch.testing.assert_close(ours(**call).logits, theirs(**call).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tensors_that_were_trained_are_refused(config: peft.PeftConfig, tmp_path: Path) -> None:
    _trained(_decoder(), config, tmp_path, everywhere=True)
    with pytest.raises(PeftfxError, match="this call does not run it"):
        peftfx.load(_decoder(), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["DoRA", "PiSSA"])
def test_variants_that_change_the_base_with_a_zero_b_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    made = _trained(_decoder(), peft.LoraConfig(target_modules="all-linear", r=4, **options), tmp_path)
    with torch.no_grad():
        for name, module in made.named_modules():
            if "encoder_attn" in name and isinstance(module, BaseTunerLayer):
                module.lora_B["default"].weight.zero_()
                if module.lora_magnitude_vector:
                    module.lora_magnitude_vector["default"].weight.mul_(1.001)
    made.save_pretrained(str(tmp_path))
    with pytest.raises(PeftfxError, match="this call does not run it"):
        peftfx.load(_decoder(), tmp_path)


def _with_a_table_past_its_layer() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    page = {"coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 64, "visual_embed": False}
    return hf.LayoutLMv3ForSequenceClassification(hf.LayoutLMv3Config(vocab_size=99, **sizes, **page)).eval()


def _page(batch: int, length: int) -> dict[str, Tensor]:
    boxes = torch.randint(30, (batch, length, 4)).sort(-1).values
    return {"input_ids": torch.randint(3, 99, (batch, length)), "bbox": boxes}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_whose_weights_alone_are_read_get_no_training_in_peft(tmp_path: Path) -> None:
    base = _with_a_table_past_its_layer()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", r=4)).eval()
    theirs(**_page(2, 5)).logits.sum().backward()
    trained = {name for name, p in theirs.named_parameters() if p.grad is not None}
    assert not any("rel_pos" in name for name in trained)  # the code reads `layer.weight`, and peft's layer is not run
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if name in trained:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match=r"reads weights, and makes no call, of the modules of .*rel_pos_bias"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "adapter", inputs=_page(2, 7))
    case = _page(3, 5)
    with torch.no_grad():
        want = theirs(**case).logits
        torch.testing.assert_close(ours(**case).logits, want, atol=1e-5, rtol=1e-5)
    report = ours.export(tmp_path / "onnx")
    assert len(report.probes) > 5, "boxes are as many as tokens, in every call of the verification"
    torch.testing.assert_close(runtime.load(tmp_path / "onnx")(**case)["logits"], want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        theirs.base_model.model.layoutlmv3.encoder.rel_pos_bias.lora_B["default"].weight.fill_(0.1)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(PeftfxError, match="its weight is read by index"):
        peftfx.load(copy.deepcopy(base), tmp_path / "adapter", inputs=_page(2, 7))
