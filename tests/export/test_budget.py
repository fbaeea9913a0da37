"""A budget of bytes is kept, and what it chooses is, by the costs that it reports, the best that fits."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from support import quantised as q

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export.reports.report import Report
from peftfx.export_options.export import ExportOptions

FRAIL = "mlp.down"


@pytest.fixture(scope="module")
def adapted() -> peftfx.AdaptedModel:
    """A LLaMA one of whose roles has a few large numbers in each row, which leave the others few steps."""
    model = q.tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=60)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
        model.model.layers[0].mlp.down_proj.weight[:, ::16] *= 6
        made = peftfx.transform(model, peftfx.LoRA(r=2, target="attention.query | mlp.down"), seed=0).eval()
        for p in made.adapters.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.1)
    return made


@pytest.fixture(scope="module")
def whole(adapted: peftfx.AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of its weights in float32."""
    return adapted.export(tmp_path_factory.mktemp("whole") / "out").bytes["model.onnx.data"]


def test_it_fits_and_is_the_best_that_fits(adapted: peftfx.AdaptedModel, whole: int, tmp_path: Path) -> None:
    budget = whole // 4
    report = adapted.export(tmp_path / "out", budget=budget)
    assert isinstance(report, Report)
    assert report.bytes["model.onnx.data"] <= budget
    shares = {share.role: share for share in report.budget}
    assert shares[FRAIL].costs["int4(block=32)"] > 2 * shares["mlp.up"].costs["int4(block=32)"]
    assert "int8" in shares[FRAIL].scheme
    assert any("int4" in share.scheme for share in shares.values())
    told = sum(share.costs.get(share.scheme, 0.0) for share in shares.values())
    assert 0.2 * told < report.agreement["model"].kl < 5 * told


def test_a_roles_cost_is_what_rounding_it_alone_costs(adapted: peftfx.AdaptedModel, whole: int, tmp_path: Path) -> None:
    shares = {s.role: s for s in adapted.export(tmp_path / "budget", budget=f"{whole}").budget}
    alone = adapted.export(tmp_path / "alone", quantize=f"int4@{FRAIL}").agreement["model"].kl
    assert shares[FRAIL].costs["int4(block=32)"] == pytest.approx(alone, rel=0.3)


def test_the_least_sum_is_found() -> None:
    from peftfx.export.rounding import budget
    from peftfx.export_options.quantize import Scheme

    random = torch.Generator().manual_seed(1)
    schemes = {str(s): s for s in budget.candidates()}

    class Role(budget._Role):
        def bytes(self, scheme: Scheme | None) -> int:
            return self.sizes["none" if scheme is None else str(scheme)]

    for _ in range(20):
        roles = {}
        for number in range(4):
            role = Role(costs={name: float(torch.rand(1, generator=random)) for name in schemes})
            role.sizes = {name: int(torch.randint(1, 100, (1,), generator=random)) for name in ("none", *schemes)}
            roles[str(number)] = role
        found = budget._least(roles, schemes, 150)
        ways = itertools.product(("none", *schemes), repeat=4)
        fits = [w for w in ways if sum(roles[str(i)].sizes[n] for i, n in enumerate(w)) <= 150]
        best = min((sum(roles[str(i)].costs.get(n, 0.0) for i, n in enumerate(w)) for w in fits), default=None)
        got = None if found is None else sum(roles[r].costs.get(n, 0.0) for r, n in found.items())
        assert got == (best if best is None else pytest.approx(best))


def test_what_makes_no_sense_is_refused(adapted: peftfx.AdaptedModel, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="the smallest way takes") as error:
        adapted.export(tmp_path / "out", budget=1000)
    assert error.value.hint.endswith("kB or more")
    with pytest.raises(PeftfxError, match="bytes as they are, 1,000,000,000 are allowed: nothing needs to be rounded"):
        adapted.export(tmp_path / "out", budget="1GB")
    with pytest.raises(PeftfxError, match="quantize and budget are both given"):
        ExportOptions(budget="1GB", quantize="int4")
    with pytest.raises(PeftfxError, match="not a size"):
        ExportOptions(budget="small")
    assert ExportOptions(budget="1GB", max_error="kl=0.1").room == 10**9
    assert list(tmp_path.iterdir()) == []


def t5() -> peftfx.AdaptedModel:
    """Of two graphs over one embedding, which is the head, too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)
    return peftfx.transform(hf.T5ForConditionalGeneration(config).eval(), peftfx.LoRA(r=2), seed=0)


@pytest.mark.slow
def test_a_model_of_two_graphs_has_one_budget(tmp_path: Path) -> None:
    adapted = t5()
    report = adapted.export(tmp_path / "out", budget="30kB")
    assert report.bytes["model.onnx.data"] <= 30_000
    shares = {share.role: share for share in report.budget}
    assert all(cost > 0 for share in shares.values() for cost in share.costs.values())
    assert shares["head"].scheme != "none", "the largest: rounded in both graphs"
    kept = onnx.load(tmp_path / "out/encoder_model.onnx", load_external_data=False).graph.initializer
    assert not [value.name for value in kept if list(value.dims) == [64, 32]], "no float copy of the embedding"
    assert {file for file, names in report.quantized.items() if names} == {"encoder_model.onnx", "decoder_model.onnx"}


@pytest.mark.slow
def test_a_graph_whose_adapters_change_is_measured_without_one(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1, hidden_size=64)
    report = peftfx.export_onnx(model, tmp_path / "slots", slots="all-linear", budget="180kB")
    assert report.budget
    assert report.slots
    made = peftfx.transform(model, peftfx.LoRA(r=2), seed=0).eval()
    report = made.export(tmp_path / "rows", batched=["default"], budget="150kB")
    assert all(cost > 0 for share in report.budget for cost in share.costs.values())


@pytest.mark.slow
def test_one_without_logits_is_measured(tmp_path: Path) -> None:
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    bert = peftfx.transform(
        hf.BertModel(hf.BertConfig(vocab_size=64, max_position_embeddings=64, **size)).eval(), peftfx.LoRA(r=2)
    )
    report = bert.export(tmp_path / "bert", budget="150kB")
    assert all(cost > 0 for share in report.budget for cost in share.costs.values())
    assert report.bytes["model.onnx.data"] <= 150_000
