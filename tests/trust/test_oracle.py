"""What verification holds an export against is made by another road: what capture, sites or loading lost, it sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.adapters.files import accounts
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxWarning
from peftfx.export import OnnxModel
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.eager.swapped_weight import SwappedWeight
from peftfx.model.adapted import AdaptedModel
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites
from peftfx.views import capture as capturing
from peftfx.views.capturing import program_graph


def stirred(adapted: AdaptedModel, std: float = 0.2) -> AdaptedModel:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.add_(torch.randn(p.shape, generator=random) * std)
    return adapted


def without(path: str, found: Callable[..., Sites]) -> Callable[..., Sites]:
    """A search for sites that overlooks one."""
    return lambda *given: Sites(tuple(site for site in found(*given) if site.path != path))


LOST = "model.layers.1.mlp.down_proj"


@pytest.mark.usefixtures("capture_each")
def test_a_site_that_the_search_overlooks_in_the_exported_view_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapted = stirred(peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2, target="all-linear"), seed=0))
    monkeypatch.setattr(program_graph, "find_sites", without(LOST, program_graph.find_sites))
    with pytest.raises(VerificationError, match="disagrees"):
        adapted.export(tmp_path / "out", view="decode")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("capture_each")
def test_what_loading_takes_for_a_module_that_never_runs_is_named_where_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = ZOO["llama"].build()
    stirred(peftfx.transform(model, peftfx.LoRA(r=2, target="all-linear"), seed=0)).save_pretrained(tmp_path / "a")
    adapted = peftfx.model.api.bare(ZOO["llama"].build())
    whole = adapted.sites
    monkeypatch.setattr(AdaptedModel, "sites", Sites(tuple(site for site in whole if site.path != LOST)))
    monkeypatch.setattr(accounts, "never_runs", lambda path, *_: path.startswith(LOST))
    with pytest.warns(UserWarning, match="no call of the model runs"):
        adapted.load_adapter(tmp_path / "a", "x")
    with pytest.raises(VerificationError, match="the reference adapts none of them") as raised:
        adapted.export(tmp_path / "out", view="forward")
    assert LOST in str(raised.value)


@pytest.mark.usefixtures("capture_each")
def test_a_capture_that_forgets_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    capture = capturing.as_graph

    def spoilt(*args: object) -> object:
        graph = capture(*args)  # type: ignore[arg-type]
        node = next(n for n in graph.nodes() if n.target is torch.ops.aten.gelu.default)
        node.replace_all_uses_with(node.args[0])
        graph.module.recompile()
        return graph

    monkeypatch.setattr(capturing, "as_graph", spoilt)
    with pytest.raises(VerificationError, match="disagrees"):
        peftfx.export_onnx(ZOO["bert"].build(), tmp_path / "out", allow_fixed=True)


METHODS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"]),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=["v_proj"], bias="all", lora_bias=True),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "pissa": peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj", "up_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "tokens": peft.TrainableTokensConfig(token_indices=list(range(4, 90)), target_modules=["embed_tokens"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "head": peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def llama() -> AdaptedModel:
    return peftfx.model.api.bare(ZOO["llama"].build())


@pytest.mark.parametrize("name", METHODS)
def test_the_eager_reference_is_peft(name: str, llama: AdaptedModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(ZOO["llama"].build(), METHODS[name])
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.2)
    theirs.eval().save_pretrained(tmp_path)
    adapted = llama
    adapted.load_adapter(tmp_path, "x")
    inputs = ZOO["llama"].inputs(2, 6, model=adapted.base)
    reference = EagerReference(adapted, None, inputs)
    got = reference(inputs)["logits"]
    with torch.no_grad():
        want = theirs(**inputs, use_cache=name == "prefix").logits
        plain = adapted.base(**inputs, use_cache=False).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[:, -6:][seen], want[:, -6:][seen], rtol=1e-4, atol=1e-4)
    assert float((got[:, -6:] - plain)[seen].abs().max()) > 1e-3
    assert reference.named == reference.seen
    adapted.remove()
    after = adapted.base(**inputs, use_cache=False).logits
    torch.testing.assert_close(after, plain, rtol=0, atol=0)  # the module is as it was


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("kinds", [("lora", "dora"), ("dora", "lora"), ("dora", "dora"), ("ia3", "ia3")], ids=str)
@torch.no_grad()
def test_two_at_one_module_are_pefts_in_the_reference(kinds: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = {"r": 2, "lora_alpha": 5, "target_modules": ["up", "down"]}
    configs = {
        "lora": lambda: peft.LoraConfig(**plain),
        "dora": lambda: peft.LoraConfig(**plain, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    }
    base = Feed().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[kinds[0]](), adapter_name="one")
    theirs.add_adapter("two", configs[kinds[1]]())
    theirs.base_model.set_adapter(["one", "two"])
    for name, p in theirs.named_parameters():
        if "one" in name or "two" in name:
            p.add_(torch.randn(p.shape) * 0.3)
    theirs.eval().save_pretrained(tmp_path)
    inputs = {"x": torch.randn(3, 6)}
    adapted = peftfx.load(base, tmp_path / "one", "one", inputs=inputs)
    adapted.load_adapter(tmp_path / "two", "two")
    adapted.set_adapter(["one", "two"])
    (got,) = EagerReference(adapted, None, inputs)(inputs).values()
    torch.testing.assert_close(got, theirs(**inputs), rtol=1e-5, atol=1e-5)


class Grouped(nn.Module):
    """A conv of several groups, a packed attention that reads its projection's weight itself, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(32, 16), nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.heads, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(x + self.heads(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "method", [peftfx.LoRA(r=4, target="all-linear | mix | words"), peftfx.IA3(target="mix | out")]
)
def test_modules_that_compute_in_ways_of_their_own_are_adapted_too(method: object, tmp_path: Path) -> None:
    ids = {"ids": torch.randint(32, (2, 6))}
    adapted = stirred(peftfx.transform(Grouped().eval(), method, inputs=ids, seed=0))
    for merge in (True, False):
        report = adapted.export(tmp_path / str(merge), inputs=ids, merge=merge)
        assert report.reference.startswith("the model's own code")
        assert not report.idle


def test_parts_of_a_fused_projection_and_two_adapters_at_once(tmp_path: Path) -> None:
    adapted = peftfx.transform(ZOO["gpt2"].build(), peftfx.LoRA(r=2, target="attention.query | mlp"), seed=0)
    adapted.add_adapter("two", peftfx.IA3(target="attention.value"))
    adapted.set_adapter(["default", "two"])
    report = stirred(adapted).export(tmp_path / "out", view="forward")
    assert report.max_rel < 1e-4


class RowScale(WeightMethod):
    """A method that nobody published."""

    peft_type = "ROW_SCALE_OF_TEST"
    default_target = "mlp"
    __hash__ = WeightMethod.__hash__

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"scale": torch.ones_like(base.weight[:, 0])}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return (y * p["scale"]).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight * p["scale"][:, None], None if base.bias is None else base.bias * p["scale"])

    def keys(self, site: Site) -> dict[str, str]:
        return {"scale": "row_scale"}

    def whole(self, site: Site, base: Base, parts: dict[Rows, Params]) -> tuple[RowScale, dict[str, Tensor]]:
        raise NotImplementedError


def test_a_method_of_the_users_own_is_applied_by_its_forward_and_the_report_says_so(tmp_path: Path) -> None:
    adapted = stirred(peftfx.transform(ZOO["bert"].build(), RowScale()))
    report = adapted.export(tmp_path / "out", view="forward")
    assert "RowScale by its own `forward`" in report.reference


def test_no_weight_is_copied_for_an_adapter_that_adds_to_outputs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def put(_: SwappedWeight) -> None:
        raise AssertionError("a copy of a weight for each call, and several in float64")

    monkeypatch.setattr(SwappedWeight, "put", put)
    adapted = stirred(peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2, target="all-linear"), seed=0))
    assert adapted.road == "modules"
    adapted.export(tmp_path / "out", view="forward")


def test_what_no_hook_reaches_is_held_against_its_graph_and_the_report_says_so(tmp_path: Path) -> None:
    adapted = stirred(peftfx.transform(ZOO["llama"].build(), peftfx.LlamaAdapter(adapter_len=2)))
    assert "the adapted graph: LlamaAdapter" in adapted.export(tmp_path / "out", view="forward").reference


class Product(nn.Module):
    """A layer whose code reads no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("rule", [peftfx.BEFT(target="0"), peftfx.LoRA(r=2, target="0", lora_bias=True)])
@pytest.mark.parametrize("merge", [True, False])
def test_a_bias_at_a_layer_whose_code_reads_none_is_held_against_its_graph(
    rule: object, merge: bool, tmp_path: Path
) -> None:
    """The export was refused: "the model takes none of the sizes tried: 'bias'"."""
    model, x = nn.Sequential(Product(), nn.Linear(6, 3)).eval(), torch.randn(2, 4)
    adapted = stirred(peftfx.transform(model, rule, inputs={"input": x}, seed=0))
    report = adapted.export(tmp_path / "out", merge=merge)
    assert report.reference == "the adapted graph: it adds a bias at 0, whose own code reads none"
    (got,) = OnnxModel(tmp_path / "out")(input=x).values()
    torch.testing.assert_close(got, adapted(input=x).detach(), atol=1e-5, rtol=1e-5)
    plain = stirred(peftfx.transform(model, peftfx.LoRA(r=2, target="0"), inputs={"input": x}, seed=0))
    assert plain.export(tmp_path / "plain", merge=merge).reference.startswith("the model's own code")


class Idle(nn.Module):
    """Two layers, of which one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_module_that_never_runs_is_named_in_the_report(tmp_path: Path) -> None:
    made = peft.get_peft_model(Idle(), peft.LoraConfig(r=2, target_modules=["used", "spare"], init_lora_weights=False))
    made.save_pretrained(str(tmp_path / "adapter"))
    with pytest.warns(PeftfxWarning, match="no call of the model runs"):
        adapted = peftfx.load(Idle(), tmp_path / "adapter", inputs={"x": torch.randn(3, 6)})
    report = adapted.export(tmp_path / "out")
    assert report.idle == ["spare"]
    assert "never run: 1 module with an adapter: spare" in str(report)


class Counts(nn.Module):
    """Adds how often it has run, kept in a buffer; or keeps it and adds nothing."""

    def __init__(self, *, adds: bool, in_place: bool) -> None:
        super().__init__()
        self.adds, self.in_place, self.layer = adds, in_place, nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.count.add_(1.0)
        else:
            self.count = self.count + 1
        return self.layer(x) + (self.count if self.adds else 0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_whose_next_call_gives_something_else_is_refused_and_left_as_it_was(
    in_place: bool, tmp_path: Path
) -> None:
    rule, inputs = peftfx.LoRA(r=2, target="head", init_lora_weights=False), {"x": torch.randn(2, 4)}
    model = Counts(adds=True, in_place=in_place).eval()
    adapted = peftfx.transform(model, rule, inputs=inputs)
    with pytest.raises(PeftfxError, match=r"changes its own buffer when it runs.*\[count\]") as raised:
        adapted.export(tmp_path / "refused")
    assert raised.value.exit_code == 2
    assert model.count.item() == 0
    adapted.remove()
    with pytest.raises(PeftfxError, match=r"changes its own buffer when it runs.*\[count\]"):
        peftfx.export_onnx(model, tmp_path / "refused", slots="head", inputs=inputs)
    assert model.count.item() == 0
    assert model.count.dtype == torch.float32

    model = Counts(adds=False, in_place=in_place).eval()
    assert peftfx.transform(model, rule, inputs=inputs).export(tmp_path / "served").max_abs < 1e-5
    assert model.count.item() == 0


class CountsByHand(nn.Module):
    """Adds how often it has run, kept in a number; the buffer follows what another number says of it."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.adds, self.count, self.layer = adds, 0, nn.Linear(4, 4)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.table is None:
            self.table = torch.ones(4)
        return self.layer(x) * self.table + (self.count if self.adds else 0)


def test_a_number_that_a_forward_counts_is_state_too(tmp_path: Path) -> None:
    rule, inputs = peftfx.LoRA(r=2, target="head", init_lora_weights=False), {"x": torch.randn(2, 4)}
    model = CountsByHand(adds=True).eval()
    with pytest.raises(PeftfxError, match=r"changes its own (buffer|attribute) when it runs, and its next call gives"):
        peftfx.transform(model, rule, inputs=inputs).export(tmp_path / "refused")
    assert model.count == 0
    assert model.table is None

    model = CountsByHand(adds=False).eval()
    assert peftfx.transform(model, rule, inputs=inputs).export(tmp_path / "served").max_abs < 1e-5
    assert model.count == 0
