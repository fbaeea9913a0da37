"""A merged directory whose weights are rounded again is what its format says, whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support import quantised as q
from support.command import Result, assert_refused
from torch import Tensor

from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.export.checkpoint import packing
from peftfx.export.command import export_directory
from peftfx.export.merge_command import merge_directory
from peftfx.export.verification.comparison import VerificationError
from peftfx.export_options.merge import MergeOptions
from peftfx.quantisation.coded import Coded

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MIXED = "int4(block=16, symmetric=False); int8@head | mlp.down; none@attention.value"
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[1, 5, 9, 30, 4, 77, 8], [1, 7, 7, 12, 3, 0, 2]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, peft.PeftModel]:
    """A directory with a base and an adapter, and HF PEFT's model of them."""
    root = tmp_path_factory.mktemp("requantised")
    model = q.tiny(num_hidden_layers=1)
    model.save_pretrained(root / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(root / "adapter")
    return root, adapted


def merged_weights(adapted: peft.PeftModel) -> dict[str, Tensor]:
    """What each linear layer's weight is with the adapter, by HF PEFT's arithmetic."""
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            weight = module.weight.detach()
            path = name.removesuffix(".base_layer")
            owner = adapted.base_model.model.get_submodule(path)
            found[path] = weight + owner.get_delta_weight("default").detach() if name != path else weight
    return found


def read_again(directory: Path) -> dict[str, Tensor]:
    model = load_base(directory)
    return {
        path: p.codes.dequantise() if isinstance(p, Coded) else p.detach()
        for path, p in ((n.removesuffix(".weight"), p) for n, p in model.named_parameters())
    }


#: How far each number may be from its merged one, over the largest magnitude of its block.
STEP = {"nf4": 0.16, "int4": 1 / 7, "int8": 1 / 127}


@pytest.mark.parametrize("quantize", ["nf4", "int4"])
def test_each_number_is_the_nearest_of_its_blocks_grid(
    quantize: str, made: tuple[Path, peft.PeftModel], tmp_path: Path
) -> None:
    root, adapted = made
    out = tmp_path / "out"
    report = merge_directory(root / "base", out, adapter=root / "adapter", quantize=quantize)
    want, got = merged_weights(adapted), read_again(out)
    rounded = [path for paths in report.quantized.values() for path in paths]
    assert sorted(rounded) == sorted(path for path in want if path != "lm_head")
    assert report.left == {"lm_head": "transformers leaves it, too"}
    assert got["lm_head"].equal(want["lm_head"])
    for path in rounded:
        block = 64 if quantize == "nf4" else 32
        ends = want[path].view(-1, block).abs().amax(1, keepdim=True)
        off = (got[path] - want[path]).view(-1, block).abs() / ends
        assert float(off.max()) < 1.5 * STEP[quantize], path
        lost = float((got[path] - want[path]).norm() / want[path].norm())
        assert lost == pytest.approx(report.lost[path], rel=1e-4)
        assert 0.03 < lost < 0.12
    assert 0 < report.agreement["model"].kl < 0.01
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == ("bitsandbytes" if quantize == "nf4" else "compressed-tensors")


def test_roles_have_schemes_of_their_own(made: tuple[Path, peft.PeftModel], tmp_path: Path) -> None:
    root, adapted = made
    report = merge_directory(root / "base", tmp_path / "out", adapter=root / "adapter", quantize=MIXED, dtype="bf16")
    assert report.quantized["int8(block=32)"] == [DOWN, "lm_head"]
    assert len(report.quantized["int4(block=16, symmetric=False)"]) == 5
    assert report.left == {"model.layers.0.self_attn.v_proj": "it is not asked for"}
    want, got = merged_weights(adapted), read_again(tmp_path / "out")
    for path, most in ((DOWN, 0.01), ("lm_head", 0.01), (UP, 0.1)):
        assert float((got[path] - want[path]).norm() / want[path].norm()) < most, path
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in said["config_groups"].values()] == [4, 8]
    assert said["ignore"] == ["model.layers.0.self_attn.v_proj"]


def test_codes_of_a_base_that_no_adapter_changes_are_found_again(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1)
    q.write(tmp_path / "base", model, BNB, q.table4())
    report = merge_directory(tmp_path / "base", tmp_path / "out", quantize="nf4")
    assert max(report.lost.values()) < 1e-6
    got = read_again(tmp_path / "out")
    torch.testing.assert_close(got[UP], model.get_submodule(UP).weight.detach(), rtol=1e-5, atol=1e-7)


def test_what_is_written_wrong_is_seen(
    made: tuple[Path, peft.PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packing.words
    monkeypatch.setattr(packing, "words", lambda codes, bits: right(codes.roll(1, -1), bits))
    with pytest.raises(VerificationError, match="other values when it is read again"):
        merge_directory(made[0] / "base", tmp_path / "out", quantize="int4")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_rounded_is_refused(
    made: tuple[Path, peft.PeftModel], tmp_path: Path, peftfx: Callable[..., Result]
) -> None:
    base, out = made[0] / "base", tmp_path / "out"
    for quantize, what in (
        ("nf4; int8@head", "a directory has one format"),
        ("nf4(block=32)", "no blocks of 32"),
        ("none", "rounds no weight"),
    ):
        with pytest.raises(PeftfxError, match=what):
            MergeOptions(quantize=quantize)
    refused = {
        "int4(block=128)@attention.query": "no whole blocks of 128",
        "int4@embedding.token": "is no linear layer",
    }
    for quantize, what in refused.items():
        with pytest.raises(PeftfxError, match=what):
            merge_directory(base, out, quantize=quantize)
    with pytest.raises(VerificationError, match="costs more than kl=1e-09"):
        merge_directory(base, out, quantize="int4", max_error="kl=1e-9")
    assert_refused(peftfx("merge", "--base", base, "--output", out, "--max-error", "0.1"), "no weight is quantised")
    q.tiny(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(PeftfxError, match="another module's, too"):
        merge_directory(tmp_path / "tied", out, quantize="int4; int8@head")
    assert {path.name for path in tmp_path.iterdir()} == {"tied"}


@pytest.mark.parametrize(("quantize", "why"), [("int8", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_a_linear_layer_of_another_class_is_left_with_the_reason(quantize: str, why: str, tmp_path: Path) -> None:
    """What loads such files would leave it out, or run another forward. In ONNX it is rounded."""
    config = hf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    hf.FalconForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(PeftfxError, match=rf"a subclass of nn.Linear: .*{why}") as raised:
        merge_directory(tmp_path / "base", tmp_path / "out", quantize=quantize)
    assert "export to ONNX" in raised.value.hint
    report = export_directory(tmp_path / "base", tmp_path / "onnx", view="forward", quantize=quantize)
    assert any("query_key_value" in name for names in report.quantized.values() for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "onnx"}


@pytest.mark.slow
def test_layers_that_a_format_has_no_codes_for_are_told(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = hf.MixtralConfig(**size, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    report = merge_directory(tmp_path / "base", tmp_path / "out", quantize="int4")
    assert "a stack of weights" in report.left["model.layers.0.mlp.experts.gate_up_proj"]
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.block_sparse_moe.experts.1.w2" in said["ignore"], "as the files name it"
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PeftfxError, match="it is a Conv1D"):
        merge_directory(tmp_path / "gpt2", tmp_path / "out2", quantize="int4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "package"), [("nf4", "bitsandbytes"), ("int4; int8@mlp.down", "compressed_tensors")]
)
def test_transformers_loads_the_same_weights(
    quantize: str, package: str, made: tuple[Path, peft.PeftModel], tmp_path: Path
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    root, out = made[0], tmp_path / "out"
    merge_directory(root / "base", out, adapter=root / "adapter", quantize=quantize)
    loaded, want = hf.AutoModelForCausalLM.from_pretrained(out).eval(), read_again(out)
    if package == "bitsandbytes":
        from bitsandbytes.functional import dequantize_4bit

        for path in (DOWN, UP):
            weight = loaded.get_submodule(path).weight
            torch.testing.assert_close(dequantize_4bit(weight.data, weight.quant_state), want[path])
        return
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, load_base(out)(IDS).logits)
