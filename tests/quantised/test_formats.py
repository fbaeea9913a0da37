"""Each format of quantised bases: its codes stand for the matrix of its definition, and ONNX has them as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from quantised.formats import FORMATS, IDS, METADATA, on_identity, picked
from safetensors.torch import save_file
from support import quantised as q
from support.few import but_further
from transformers.pytorch_utils import Conv1D

import peftfx
from peftfx.bases.load import load_base
from peftfx.export.coded.operators import product_for
from peftfx.export.coded.rows import CodedRows, coded_rows
from peftfx.export.command import export_directory
from peftfx.export.reports.report import Report
from peftfx.quantisation.coded import Coded


def adapt(model: torch.nn.Module, directory: Path) -> peft.PeftModel:
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(directory)
    return adapted


FILE = "model.safetensors"
WHOLE = ("nf4", "nf4-double", "bnb-int8", "gptq-zeros", "gptq-act", "awq", "fp8-blocks")


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_matrix_and_the_operator_has_it(name: str, tmp_path: Path) -> None:
    said, pack, operator = FORMATS[name]
    model = q.tiny(num_hidden_layers=1)
    q.write(tmp_path, model, said, pack, METADATA.get(name, ""))
    coded = {path: p for path, p in load_base(tmp_path).named_parameters() if isinstance(p, Coded)}
    assert len(coded) == 7
    for path, p in coded.items():
        torch.testing.assert_close(p.codes.dequantise(), model.get_parameter(path).detach(), rtol=3e-7, atol=0)
    weight = coded["model.layers.0.mlp.down_proj.weight"]
    made = product_for(weight.codes, "w", "w", 23)
    if isinstance(made, str):
        assert operator == "float32"
        return
    assert made.operator == operator
    got = on_identity(made, weight.codes.columns)
    torch.testing.assert_close(got, weight.codes.dequantise().T, rtol=2e-6, atol=2e-6 * float(got.abs().max()))
    fresh = product_for(weight.codes, "w", "w", 23, by_row=True)
    assert not isinstance(fresh, str)
    found = coded_rows(fresh)
    unpicked = operator == "DequantizeLinear" or name in ("gptq-act", "nf4-blocks-of-512")
    assert isinstance(found, str) == unpicked, "no blocks of rows of their own, or columns in another order"
    if isinstance(found, CodedRows):
        rows = picked(fresh, found, torch.tensor([[3, 0], [63, 3]]))
        want = weight.codes.dequantise()[torch.tensor([[3, 0], [63, 3]])]
        torch.testing.assert_close(rows, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("name", but_further({"nf4", "gptq-act"}, WHOLE))
def test_a_base_is_exported_as_it_is(name: str, tmp_path: Path) -> None:
    said, pack, operator = FORMATS[name]
    model = q.tiny()
    q.write(tmp_path / "base", model, said, pack)
    adapted = adapt(model, tmp_path / "adapter")
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert isinstance(report, Report)
    assert [(c.operator, len(c.weights)) for c in report.codes["model"]] == [(operator, 14)]
    assert not report.merged
    linear = sum(p.numel() for path, p in model.named_parameters() if ".layers." in path and p.ndim == 2)
    other = sum(p.numel() for path, p in adapted.named_parameters() if p.ndim == 2) - linear
    bits = {"MatMulBnb4": 6, "MatMulNBits": 10 if "int8" in name else 6, "DequantizeLinear": 9.1}[operator]
    assert report.bytes["model.onnx.data"] < linear * bits / 8 + other * 4 + 70_000
    served = peftfx.runtime.load(tmp_path / "out")
    with torch.no_grad():
        want = adapted(IDS).logits
    got = served(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("kind", [hf.GPT2LMHeadModel, hf.GPT2Model])
def test_codes_of_a_conv1d_are_rows_of_outputs_as_its_weight_is_not(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100))
    said, pack, _ = FORMATS["nf4"]
    random, tensors = np.random.default_rng(0), dict(model.state_dict())
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Conv1D)}
    for path, module in layers.items():
        own, weight = pack(random, *module.weight.T.shape)
        module.weight.data.copy_(weight.T)
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{name}": tensor for name, tensor in own.items()}
    model.config.quantization_config = said
    model.config.save_pretrained(tmp_path)
    save_file({name: t.contiguous() for name, t in tensors.items() if name != "lm_head.weight"}, tmp_path / FILE)
    base = load_base(tmp_path, task="text-generation").base_model
    coded = {path: p for path, p in base.named_parameters() if isinstance(p, Coded)}
    assert len(coded) == len(layers) == 4
    for path, p in coded.items():
        torch.testing.assert_close(p + 0, model.base_model.get_parameter(path).detach(), rtol=3e-7, atol=0)


def test_floats_in_blocks_ask_for_a_version_that_has_their_operator(tmp_path: Path) -> None:
    said, pack, operator = FORMATS["fp8-blocks"]
    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**q.SIZES, "num_hidden_layers": 1}, vocab_size=50))  # no RMS norm
    q.write(tmp_path / "base", model, said, pack)
    report = export_directory(tmp_path / "base", tmp_path / "out", view="forward")
    assert isinstance(report, Report)
    assert (report.opset, [c.operator for c in report.codes["model"]]) == (23, [operator])
    report = export_directory(tmp_path / "base", tmp_path / "older", view="forward", opset=20)
    assert isinstance(report, Report)
    assert [(c.operator, c.reason) for c in report.codes["model"]] == [("float32", "its operator needs opset 21")]


def test_integers_that_are_no_codes_are_the_files_too(tmp_path: Path) -> None:
    config = hf.MraConfig(**q.SIZES, vocab_size=50, max_position_embeddings=32, block_per_row=2)
    torch.manual_seed(0)
    model = hf.MraForSequenceClassification(config).eval()
    model.mra.embeddings.position_ids.copy_(model.mra.embeddings.position_ids.flip(1))
    said, pack, _ = FORMATS["fp8"]
    q.write(tmp_path / "base", model, said, pack)
    loaded = load_base(tmp_path / "base")
    assert torch.equal(loaded.get_buffer("mra.embeddings.position_ids"), model.mra.embeddings.position_ids)
    ids = torch.arange(32).unsqueeze(0)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
