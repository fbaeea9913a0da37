"""Exports in other dtypes than the base's: merged in float32 and rounded once; and what guards an export's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch
import transformers as hf
from support.few import but_for, but_further

from peftfx import runtime
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export import OnnxModel, export_onnx
from peftfx.export.command import export_directory
from peftfx.files import Snapshot
from peftfx.graph.lazy_weights import Stored

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MANTISSA = {torch.float16: 10, torch.bfloat16: 7}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), DTYPES[request.param])


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("one"), torch.float16)


def saved(root: Path, dtype: torch.dtype) -> Path:
    """A LLaMA in half precision, and a LoRA of `peft`'s for it."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, dtype=dtype)
    model = hf.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(root / "base", max_shard_size="30KB")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.save_pretrained(str(root / "adapter"))
    return root


@pytest.mark.parametrize("wanted", [*but_for({"fp32"}, ["fp32", "fp16"]), *but_further({"bf16"}, ["bf16"])])
def test_weights_are_merged_in_float32_and_rounded_once(half: Path, wanted: str, tmp_path: Path) -> None:
    said: list[str] = []
    report = export_directory(
        half / "base", tmp_path / "out", adapter=half / "adapter", dtype=wanted, progress=said.append
    )
    dtype = DTYPES[wanted]
    base = hf.LlamaForCausalLM.from_pretrained(half / "base", dtype="auto").state_dict()
    adapter = peft.utils.load_peft_weights(str(half / "adapter"))
    stored = {
        name: torch.from_numpy(value.const_value.numpy().astype("float64"))
        for name, value in ir.load(tmp_path / "out" / "model.onnx").graph.initializers.items()
    }
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (adapter[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        weight = base[f"{path}.weight"].double()
        exact = weight + 1.5 * b @ a
        got = stored[f"{path}.weight"]
        got = got if got.shape == exact.shape and torch.allclose(got, exact, atol=0.1) else got.T
        if dtype == torch.float32:
            assert torch.allclose(got, exact, rtol=1e-6, atol=1e-7)
            continue
        largest, lost = float(exact.abs().max()), float((got - exact).abs().max())
        assert report.rounding[path] == pytest.approx({"max_abs": lost, "max_rel": lost / largest}, rel=1e-2)
        spacing = (exact.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor() - MANTISSA[dtype]).exp2()
        # What float32 itself may be off by, in a sum of four products and two operations more: where terms cancel out,
        # it is a part of the spacing. Rounded twice, a weight is off by up to 0.75 of that.
        slack = 6 * torch.finfo(torch.float32).eps / 2 * (weight.abs() + 1.5 * b.abs() @ a.abs())
        assert bool(((got - exact).abs() <= spacing / 2 + slack).all())
        assert float((slack / spacing).median()) < 0.01  # so it hides nothing
    assert torch.equal(stored["model.embed_tokens.weight"], base["model.embed_tokens.weight"].to(dtype).double())
    own = {torch.float32: {}}.get(dtype, report.merged)
    assert set(report.rounding) == set(own)
    assert ("rounded by at most" in str(report)) == bool(own)
    twin = wanted == "bf16"
    assert ("twin" in report.verified) == twin
    assert any("no kernels" in line for line in said[: said.index("capture")]) == twin
    assert not [p for p in (tmp_path / "out").iterdir() if "twin" in p.name]


def test_a_model_in_bfloat16_in_memory_can_be_exported(tmp_path: Path) -> None:
    import peftfx

    torch.manual_seed(0)
    model = hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16)
    ).to(torch.bfloat16)
    adapted = peftfx.transform(model, peftfx.LoRA(r=4, init_lora_weights=False))
    with pytest.warns(UserWarning, match="serve this model on another"):
        report = adapted.export(tmp_path / "out", view="forward")
    assert "twin" in report.verified
    assert "runs on: GPUs" in str(report)
    assert ir.load(tmp_path / "out" / "model.onnx").graph.inputs[0].dtype == ir.DataType.BFLOAT16
    with pytest.raises(PeftfxError, match="cannot open"):
        OnnxModel(tmp_path / "out")


def test_a_mapped_base_takes_no_memory_and_cannot_be_written(fp16: Path) -> None:
    from peftfx.bases.load import load_base

    model = load_base(fp16 / "base", dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, Stored)
    assert weight.dtype == torch.float32
    assert weight.source.dtype == torch.float16
    with pytest.raises(PeftfxError, match="cannot be written"), torch.no_grad():
        weight.add_(1.0)


def test_an_input_that_changes_while_it_is_read(fp16: Path, tmp_path: Path) -> None:
    """Its bytes may be of two models: nothing is published."""
    shard = sorted((fp16 / "base").glob("*.safetensors"))[0]

    def change(done: int, total: int) -> None:
        shard.touch()

    with pytest.raises(PeftfxError, match="changed while") as raised:
        export_directory(fp16 / "base", tmp_path / "out", written=change)
    assert shard.name in raised.value.where
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_does_not_mind_new_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a", encoding="utf-8")
    snapshot = Snapshot(tmp_path)
    (tmp_path / "b").write_text("b", encoding="utf-8")
    snapshot.check()
    (tmp_path / "a").unlink()
    with pytest.raises(PeftfxError, match="changed"):
        snapshot.check()


@pytest.mark.parametrize(("limit", "fits"), [(10**9, False), (2 * 10**9, True)])
def test_a_limit_on_memory_is_kept_or_refused_before_the_work(
    fp16: Path, tmp_path: Path, limit: int, fits: bool
) -> None:
    said: list[str] = []
    if fits:
        export_directory(fp16 / "base", tmp_path / "out", max_memory=limit)
        return
    with pytest.raises(PeftfxError, match="are needed") as raised:
        export_directory(fp16 / "base", tmp_path / "out", max_memory=limit, progress=said.append)
    assert "GB or more" in raised.value.hint
    assert "capture" not in said
    assert list(tmp_path.iterdir()) == []


WORDS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 2}
MIXED: dict[str, Callable[[], torch.nn.Module]] = {
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**WORDS)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**WORDS, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**WORDS, head_dim=8, intermediate_size_mlp=48, num_local_experts=4)
    ),
}


@pytest.mark.parametrize("name", but_for({"gpt_oss", "llama4"}, MIXED))
@torch.no_grad()
def test_float16_models_whose_code_computes_in_float32_are_exported(name: str, tmp_path: Path) -> None:
    """Norms and rotary tables in float32, sums, and writes of float32 into float16."""
    torch.manual_seed(0)
    model = MIXED[name]().eval().half()
    export_onnx(model, tmp_path / "out")
    served = runtime.load(tmp_path / "out")
    ids = torch.randint(4, 99, (3, 9))
    made = served.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(made.logits[0].float(), model(ids).logits[:, -1].float(), atol=1e-2, rtol=1e-2)


class Mixes(torch.nn.Module):
    """Sums in float16, and float32 that is added to float16 in place, to the whole and to a part."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x * 2
        h.add_(y)
        h[:, :1].mul_(y[:, :1] + 1)
        return h.sum(1) + 1, h.sum(), h, x.sum((0, 2), keepdim=True)


def test_sums_and_writes_keep_the_dtype_of_a_float16_model(tmp_path: Path) -> None:
    call = {"x": torch.randn(3, 5, 8).half(), "y": torch.randn(3, 5, 8)}
    export_onnx(Mixes().half(), tmp_path / "out", inputs=call)
    for batch in (1, 2):
        x, y = torch.randn(batch, 5, 8).half(), torch.randn(batch, 5, 8)
        for got, want in zip(OnnxModel(tmp_path / "out")(x=x, y=y).values(), Mixes()(x, y), strict=True):
            assert got.dtype == want.dtype == torch.float16
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-3)


class Routed(torch.nn.Module):
    """Operators that ONNX does not define for bfloat16, or not in each version."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv1d(4, 8, 3), torch.nn.InstanceNorm1d(8, affine=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = torch.nn.functional.softplus(self.norm(self.conv(x)))
        return h.sum(-1), h.flatten(1).topk(2).values


@pytest.mark.parametrize("level", ["cpu", "none"])
def test_a_bfloat16_export_has_operators_of_its_dtype(level: str, tmp_path: Path) -> None:
    """The CPU has no kernels for them: that the file is valid is all that ONNX Runtime can say here."""
    torch.manual_seed(0)
    routed = Routed().eval().to(torch.bfloat16)
    export_onnx(routed, tmp_path / "own", inputs={"x": torch.randn(3, 4, 9).bfloat16()}, optimize=level)
    if level == "cpu":
        export_onnx(MIXED["gpt_oss"]().eval().to(torch.bfloat16), tmp_path / "experts", view="forward")
    for path in tmp_path.glob("*/model.onnx"):
        made = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented):
            onnxruntime.InferenceSession(path)


class AddsUp(torch.nn.Module):
    """Rows and numbers that are added up at places, as by the code of some mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        rows = torch.zeros_like(y).index_add(0, places, y)
        return rows, torch.zeros_like(y).scatter_add(0, places[:, None].expand(y.shape), y)


@torch.no_grad()
def test_what_is_added_up_at_places_in_half_precision_runs(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no kernels for it in float16."""
    torch.manual_seed(0)
    model, places = AddsUp().eval().half(), torch.tensor([1, 0, 1, 3, 1])
    x = torch.randn(5, 8).half()
    export_onnx(model, tmp_path / "out", inputs={"x": x, "places": places})
    places = torch.tensor([4, 4, 0, 2, 4])
    got = runtime.load(tmp_path / "out")(x=x, places=places)
    for a, b in zip(got.values(), model(x, places), strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a, b, atol=4e-3, rtol=4e-3)


class InBfloat16(torch.nn.Module):
    """A float32 model whose own code computes in bfloat16: element by element, in a product, and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x).bfloat16()
        slopes = torch.arange(8, device=x.device).bfloat16() * 0.3
        h = torch.cat([h[:, :4] * slopes[:4], torch.where(h > 0, h, -h).sigmoid()[:, 4:]], dim=-1)
        return self.last(h.float()), h.float() @ h.float().T


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_bfloat16_of_a_float32_models_own_code_runs_on_a_cpu(level: str, tmp_path: Path) -> None:
    """Its operations are computed between casts. Each value is rounded as torch rounds it, at each optimisation."""
    torch.manual_seed(0)
    model, x = InBfloat16().eval(), torch.randn(5, 8)
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(3, 8)})
    assert report.verified == "the model"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options)
    for got, want in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want.detach(), atol=1e-5, rtol=1e-5)


def test_a_float32_model_that_returns_bfloat16_is_told(tmp_path: Path) -> None:
    class Narrow(InBfloat16):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)[0].bfloat16()

    with pytest.warns(PeftfxWarning, match="bfloat16: ONNX Runtime's CPU provider has no kernels"):
        export_onnx(Narrow().eval(), tmp_path / "out", inputs={"x": torch.randn(3, 8)})


B = torch.bfloat16
IN_BFLOAT16: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number that is added": lambda h: h.to(B) + 1.3,
    "a number that is multiplied": lambda h: h.to(B) * 1.3,
    "remainders": lambda h: torch.remainder(h.to(B) * 10, 0.3),
    "powers": lambda h: h.to(B).abs().pow(0.3),
    "comparisons": lambda h: (torch.zeros_like(h).to(B).masked_fill(h > 0, 0.3) == 0.3) * h,
    "a causal mask": lambda h: (
        h.transpose(1, 2) @ torch.full((h.shape[1], h.shape[1]), -3.0, dtype=B).triu(1).float()
    ).transpose(1, 2),
    "places": lambda h: torch.arange(h.shape[1], dtype=B)[:, None] * h.to(B),
    "zeros of a free size": lambda h: torch.zeros(h.shape[1], 8, dtype=B) + h.to(B),
    "a factor by name": lambda h: torch.addcmul(h.to(B), h.to(B), h.to(B), value=0.1),
    "parts": lambda h: torch.cat(h.to(B).split([3, 5], dim=-1)[::-1], dim=-1).sigmoid(),
    "several results": lambda h: h.to(B).sort(dim=-1)[0],
}


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_operations_in_bfloat16_are_torchs_own(name: str, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.narrow = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2).bfloat16()
            with torch.no_grad():  # whole numbers: torch and ONNX Runtime agree to the last bit
                self.first.weight.copy_(torch.randint(-2, 3, (8, 8)))
                self.first.bias.copy_(torch.randint(-2, 3, (8,)))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = IN_BFLOAT16[name](self.first(x)).float()
            return h, self.narrow(x.bfloat16()).float()

    torch.manual_seed(0)
    model = Model().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randint(-4, 5, (2, 5, 8)) / 4})
    assert report.verified == "the model"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert session.get_outputs()[0].shape == ["batch", "x.1", 8]
    x = torch.randint(-4, 5, (3, 7, 8)) / 4
    for got, want in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want.detach(), atol=1e-5, rtol=1e-5)
