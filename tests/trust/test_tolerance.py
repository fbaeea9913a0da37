"""What may differ means something: right answers pass, wrong ones fail, NaN is named, and messages fit a screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.command import Result
from support.few import but_for
from support.quantised import pack, unpack
from support.words import word_tokenizer
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.command import export_directory
from peftfx.export.reports.facts import add_comparisons
from peftfx.export.reports.report import Report
from peftfx.export.verification import probes
from peftfx.export.verification.agreement import MaxError
from peftfx.export.verification.comparison import Comparison, VerificationError
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.tolerances.float64 import float64
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.views.decode import positions
from peftfx.views.view import without_cache


def llama(layers: int = 2, hidden: int = 32, **more: object) -> nn.Module:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=96, num_attention_heads=4, pad_token_id=0, **sizes, **more)
    return hf.LlamaForCausalLM(config).eval()


def stirred(model: nn.Module, std: float) -> AdaptedModel:
    adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="all-linear"), seed=0)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * std)
    return adapted


@pytest.mark.parametrize(
    "name", but_for({"gemma2", "t5", "deberta"}, ["llama", "gemma2", "bert", "t5", "convnext", "deberta"])
)
@torch.no_grad()
def test_the_mode_is_what_a_model_cast_to_float64_computes(name: str) -> None:
    model = ZOO[name].build().eval()
    inputs = ZOO[name].inputs(model=model)
    with without_cache(model), float64():
        got = model(**inputs)[0]
    assert got.dtype == torch.float64
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    with without_cache(model):
        plain = model(**inputs)[0]
        want = model.double()(**wide)[0]
    # a model's own casts to float32 stay where it is cast, and not in the mode
    assert float((got - want).abs().max()) <= float((plain - want).abs().max()) + 1e-12
    assert 0 < float((plain - got).abs().max()) < 1e-4 * float(got.abs().max())


@torch.no_grad()
def test_a_graph_with_convs_runs_in_float64_too() -> None:
    """Its operators compare the dtypes of their operands, as the functions of eager code do."""
    model = ZOO["convnext"].build().eval()
    inputs = ZOO["convnext"].inputs(model=model)
    graph = peftfx.capture(model, inputs)
    with float64():
        want, got = model(**inputs).logits, graph(**inputs)["logits"]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=0, rtol=1e-12)


@pytest.mark.further
def test_a_graph_with_convs_and_slots_is_measured(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}
    base = hf.Mamba2ForCausalLM(hf.Mamba2Config(vocab_size=96, chunk_size=8, **sizes)).eval()
    report = peftfx.export_onnx(base.half(), tmp_path / "out", slots="all-linear", view="forward")
    assert not report.unmeasured


def test_experts_that_run_as_a_grouped_product_are_measured(tmp_path: Path) -> None:
    """torch has no such product in float64: the mode computes it group by group, also a group without rows."""
    rows, weights, ends = torch.randn(10, 8), torch.randn(3, 8, 16), torch.tensor([4, 4, 9], dtype=torch.int32)
    with float64():
        got = nn.functional.grouped_mm(rows, weights, offs=ends)
    want = torch.cat([rows[:4].double() @ weights[0].double(), rows[4:9].double() @ weights[2].double()])
    torch.testing.assert_close(got[:9], want, atol=0, rtol=1e-14)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes)
    report = stirred(hf.MixtralForCausalLM(config).eval(), 0.2).export(tmp_path / "out", view="forward")
    assert not report.unmeasured
    assert report.float32


def test_a_model_that_keeps_no_state_runs_once_in_float64() -> None:
    """Its buffers are compared in their own dtype, also where torch widens every copy."""
    adapted, calls = stirred(llama(), 0.1), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    reference = EagerReference(adapted, None)
    adapted.base.register_forward_hook(count)
    feed = {"input_ids": torch.tensor([[5, 7, 9]])}
    reference(feed)
    assert calls == 1
    with float64():
        wide = reference(feed)
    assert wide["logits"].dtype == torch.float64
    assert calls == 2


def test_a_large_adapter_passes_under_what_float32_itself_loses(tmp_path: Path) -> None:
    adapted = stirred(llama(8, 64), std=2.0)
    report = adapted.export(tmp_path / "out", view="decode")
    assert report.float32 is not None
    assert report.float32 > 0
    written = json.loads((tmp_path / "out" / "peftfx_report.json").read_text())
    assert all(c["max_abs"] <= c["bound"] and c["float32"] is not None for c in written["comparisons"])


@pytest.mark.parametrize("std", [0.2, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_wrong_answer_fails_however_large_the_adapter_is(
    std: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapted = stirred(llama(4), std)
    eager = EagerReference.__call__

    def a_little_off(self: EagerReference, feed: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = next(p for n, p in self.adapted.adapters.named_parameters() if "3.mlp.down_proj.lora_B" in n)
        with torch.no_grad():
            weight.mul_(1.05)
            found = eager(self, feed)
            weight.div_(1.05)
        return found

    monkeypatch.setattr(EagerReference, "__call__", a_little_off)
    with pytest.raises(VerificationError, match="torch itself is"):
        adapted.export(tmp_path / "out", view="decode")
    assert list(tmp_path.iterdir()) == []


def test_pasts_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = bare(llama())
    view = adapted.view("decode")
    assert view is not None
    cases = probes.view_cases(adapted, view, lambda v, feed: EagerReference(adapted, v)(feed))
    held = [case for case in cases if case["past_key_values.0.key"].shape[2] > 1]
    assert held
    for case in held:
        random = view.inputs(adapted.base, sizes={"batch": len(case["input_ids"]), "past": 6}, seed=1)
        drawn, real = random["past_key_values.0.value"].std(), case["past_key_values.0.value"].std()
        assert float(real) < 0.2 * float(drawn)
        padded = case["attention_mask"][:, : case["past_key_values.0.key"].shape[2]] == 0
        assert not case["past_key_values.1.key"].transpose(1, 2)[padded].any()


def test_a_past_that_the_model_made_is_where_a_whole_text_leaves_it() -> None:
    adapted = bare(llama())
    view = adapted.view("decode")
    assert view is not None
    run = EagerReference(adapted, view)
    made = view.inputs(adapted.base, sizes={"batch": 1, "sequence": 3, "past": 4}, seed=3)
    seen: list[Tensor] = []
    case = view.with_past(adapted.base, made, lambda v, feed: seen.append(feed["input_ids"]) or run(feed), seed=3)
    whole = torch.cat([seen[0][:1, :4], case["input_ids"]], 1)
    want = adapted.base(input_ids=whole, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(run(case)["logits"], want, rtol=1e-5, atol=1e-5)


def test_one_run_makes_the_pasts_of_all_trials() -> None:
    adapted = bare(llama())
    view = adapted.view("decode")
    assert view is not None
    own = EagerReference(adapted, view)
    runs: list[Tensors] = []
    cases = probes.view_cases(adapted, view, lambda v, feed: runs.append(dict(feed)) or own(feed))
    assert len(runs) == 1
    held = [case for case in cases if case["past_key_values.0.key"].shape[2]]
    assert {case["past_key_values.0.key"].shape[::2] for case in held} == {(2, 6), (4, 7), (1, 1), (2, 3)}
    for case in held:
        batch, past = case["past_key_values.0.key"].shape[::2]
        rows = slice(-batch, None) if batch > 1 else slice(1)
        mask = runs[0]["attention_mask"][rows, :past]
        text = {"input_ids": runs[0]["input_ids"][rows, :past], "attention_mask": mask, "position_ids": positions(mask)}
        alone = own({**view.inputs(adapted.base, sizes={"batch": batch, "past": 0}), **text})
        shown = case["attention_mask"][:, :past] != 0
        for name in ("0.key", "1.value"):
            want, got = (x.transpose(1, 2)[shown] for x in (alone[f"present.{name}"], case[f"past_key_values.{name}"]))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_past_that_no_shared_run_leaves_is_made_by_a_run_of_its_own() -> None:
    adapted = bare(llama())
    view = adapted.view("decode")
    assert view is not None
    own = EagerReference(adapted, view)
    runs: list[Tensors] = []
    for sizes in ({"batch": 5, "past": 2}, {"batch": 2, "past": 8}, {"batch": 2, "sequence": 1, "past": 1}):
        made = view.inputs(adapted.base, sizes=sizes, seed=3)
        case = view.with_past(adapted.base, made, lambda v, feed: runs.append(dict(feed)) or own(feed), seed=3)
        assert case["past_key_values.0.key"].shape == made["past_key_values.0.key"].shape
    shapes = [tuple(feed["input_ids"].shape) for feed in runs]
    assert shapes == [(5, 2), (2, 8), (4, 7)]  # a row of the last one is not padded, as in the first rows


class TestNaN:
    def test_in_an_adapter_names_its_tensor(self, tmp_path: Path) -> None:
        adapted = stirred(llama(), 0.1)
        with torch.no_grad():
            adapted.adapter("default").get("model.layers.1.mlp.up_proj.lora_B")[0, 0] = float("nan")
        with pytest.raises(PeftfxError, match=r"holds NaN or an infinity \[model.layers.1.mlp.up_proj.lora_B\]"):
            adapted.export(tmp_path / "out", view="forward")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_in_the_base_names_its_tensor(self, value: float, tmp_path: Path, peftfx: Callable[..., Result]) -> None:
        llama().save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][95, 3] = value  # of a token that no probe has
        save_file(weights, file, {"format": "pt"})
        done = peftfx("export", "--base", str(tmp_path / "base"), "--output", str(tmp_path / "out"))
        assert done.code == 2
        assert "base.model.embed_tokens.weight" in done.err
        assert not (tmp_path / "out").exists()

    def test_in_an_output_is_an_error_though_torch_gives_it_too(self, tmp_path: Path) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (x - 1000).sqrt()

        with pytest.raises(VerificationError, match="the model's own code gives NaN"):
            peftfx.export_onnx(Root(), tmp_path / "out", inputs={"x": torch.rand(2, 5)})

    def test_at_a_size_where_torch_gives_it_too_leaves_out_this_size(self, tmp_path: Path) -> None:
        class Spread(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.std(1)  # of one value there is none

        with pytest.warns(PeftfxWarning, match=r"not compared at x \[1, 1\]: the model's own code gives NaN there"):
            report = peftfx.export_onnx(Spread(), tmp_path / "out", inputs={"x": torch.rand(2, 5)})
        assert report.max_abs < 1e-4
        x = torch.randn(3, 7)
        torch.testing.assert_close(peftfx.export.OnnxModel(tmp_path / "out")(x=x)["output"], x.std(1))

    def test_masked_logits_are_none(self, tmp_path: Path) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix = nn.Linear(8, 6)
                self.register_buffer("mask", torch.tensor([0.0, 0, float("-inf"), 0, 0, float("-inf")]))

            def forward(self, x: Tensor) -> Tensor:
                return self.mix(x) + self.mask

        report = peftfx.export_onnx(Masked().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 8)})
        assert report.max_abs < 1e-4


def test_where_float64_cannot_be_had_the_report_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    eager = EagerReference.__call__

    def narrow(self: EagerReference, feed: dict[str, Tensor]) -> dict[str, Tensor]:
        if (torch.ones(1) * 1).dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return eager(self, feed)

    monkeypatch.setattr(EagerReference, "__call__", narrow)
    report = bare(ZOO["bert"].build()).export(tmp_path / "out", view="forward")
    assert report.float32 is None
    assert report.unmeasured == "no kernel for Double"
    assert "tolerance: a constant" in str(report)


def test_a_tolerance_that_is_given_is_the_one_that_holds(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    llama().save_pretrained(tmp_path / "base")
    given = ("export", "--base", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--view", "forward")
    done = peftfx(*given, "--atol", "0", "--rtol", "1e-12")
    assert done.code == 1
    assert "the tolerance is 0 + 1e-12" in done.err
    assert peftfx(*given, "--rtol", "-1").code == 2
    assert peftfx(*given, "--atol", "1", "--rtol", "0").code == 0


def test_a_message_fits_a_screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    eager = EagerReference.__call__
    monkeypatch.setattr(
        EagerReference, "__call__", lambda self, feed: {n: v + 0.5 for n, v in eager(self, feed).items()}
    )
    with pytest.raises(VerificationError) as raised:
        bare(llama(3, 16)).export(tmp_path / "other", view="decode")
    text = str(raised.value)
    assert len(text) < 1200
    assert text.count("input_ids") == 1
    assert text.count("absolute") == 3
    assert "and 4 more outputs" in text


def test_a_report_of_30_layers_is_under_100_kb(tmp_path: Path) -> None:
    names = [f"{kind}.{i}.{what}" for i in range(30) for kind in ("past_key_values",) for what in ("key", "value")]
    report = Report("LlamaForCausalLM", merged=[f"model.layers.{i}.self_attn.q_proj" for i in range(210)])
    report.inputs = {name: ["batch", 4, "past", 64] for name in names}
    found = [
        Comparison(name.replace("past_key_values", "present"), shapes, 1.2345678e-5, 2.3456789e-6, True, 3e-5, 1e-6)
        for shapes in (dict.fromkeys(names, (batch, 4, 7, 64)) for batch in range(1, 6))
        for name in [*names, "logits"]
    ]
    add_comparisons(report, found, frozenset())
    report.write(tmp_path)
    file = tmp_path / "peftfx_report.json"
    assert file.stat().st_size < 100_000
    written = json.loads(file.read_text())
    assert written["probes"][0] == {"past_key_values.*.key": [1, 4, 7, 64], "past_key_values.*.value": [1, 4, 7, 64]}
    assert written["comparisons"][0]["float32"] == 1e-6
    assert len(written["comparisons"]) == 5 * 61


class TestQuantised:
    def test_what_it_costs_is_told_on_the_models_own_text(self, tmp_path: Path) -> None:
        adapted = stirred(llama(), 0.05)
        costs = {}
        for kind in ("int8", "int4"):
            report = adapted.export(tmp_path / kind, quantize=kind)
            costs[kind] = report.agreement["model"]
            assert "greedy text" in str(report)
        assert 0 <= costs["int8"].kl < costs["int4"].kl
        assert costs["int8"].top1 >= costs["int4"].top1

    def test_the_numbers_are_those_of_the_rounded_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peftfx.export.coded.rounded._ACCURACY", 1)  # activations in float
        model = llama(tie_word_embeddings=False)
        report = peftfx.export_onnx(model, tmp_path / "out", quantize="int4", view="decode")
        adapted = bare(model)
        view = adapted.view("decode")
        from peftfx.export.verification.agreement import _greedy, _step

        run = EagerReference(adapted, view)
        feed = _step(adapted, view, _greedy(adapted, view, run))  # type: ignore[arg-type]
        want = run(feed)["logits"].log_softmax(-1)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(unpack(*pack(module.weight.detach(), 4, 32), 4, module.in_features))
        got = run(feed)["logits"].log_softmax(-1)
        told = report.agreement["model"]
        assert told.kl == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)
        assert told.top1 == pytest.approx(float((want.argmax(-1) == got.argmax(-1)).float().mean()))

    def test_a_bound_has_a_name(self, tmp_path: Path) -> None:
        adapted = stirred(llama(), 0.05)
        with pytest.raises(VerificationError, match="costs more than kl=1e-09"):
            adapted.export(tmp_path / "out", quantize="int4", max_error="kl=1e-9")
        assert list(tmp_path.iterdir()) == []
        adapted.export(tmp_path / "out", quantize="int8", max_error="top1=0.5")

    def test_a_text_of_the_users_is_what_it_is_compared_on(self, tmp_path: Path) -> None:
        model = llama()
        model.save_pretrained(tmp_path / "base")
        words = ["[UNK]", *(f"w{i}" for i in range(1, 96))]
        word_tokenizer(words, unk_token="[UNK]").save_pretrained(tmp_path / "base")
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"w{1 + i * 7 % 95}" for i in range(300)))
        done = export_directory(
            *(tmp_path / "base", tmp_path / "out"), view="decode", quantize="int8", calibration=text, max_error="kl=1"
        )
        assert done.agreement["model"].tokens == 256  # two whole rows
        assert done.agreement["model"].text == "text.txt"
        swappable = export_directory(
            *(tmp_path / "base", tmp_path / "slots"), view="decode", quantize="int8", slots="mlp", calibration=text
        )
        assert swappable.agreement["model"].kl == pytest.approx(done.agreement["model"].kl, rel=0.1)

    @pytest.mark.parametrize("given", ["kl", "top2=0.5", "kl=much", ""])
    def test_another_name_is_refused(self, given: str) -> None:
        with pytest.raises(PeftfxError, match="not a bound"):
            MaxError.of(given)

    def test_a_text_needs_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(PeftfxError, match="no such file"):
            peftfx.export_onnx(llama(), tmp_path / "out", quantize="int8", calibration=tmp_path / "none.txt")
        with pytest.raises(PeftfxError, match="calibration has no effect"):
            peftfx.export_onnx(llama(), tmp_path / "out", calibration=tmp_path / "none.txt")
