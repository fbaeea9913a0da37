"""Weight methods against `peft`: the same numbers, the same files in both directions, the same model when served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from support.adapted import randomise
from support.adapter_files import assert_crosses, first, load_peft, same
from support.few import but_for
from support.parity import check
from support.zoo import ZOO
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx import IA3, PeftfxError
from peftfx.contract.common.lora import dora, dora_layer, products
from peftfx.contract.common.lora.dora import gain, updated_norms
from peftfx.contract.common.lora.dora_layer import is_scaled_at_once, scaled_linear
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.model.adapted import AdaptedModel


@dataclass(frozen=True)
class Trial:
    """A config of `peft`'s on a model of the zoo."""

    model: str
    kind: type[peft.PeftConfig]
    options: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.__name__.removesuffix('Config')}-{self.model}-{'-'.join(map(str, self.options))}"

    def adapt(self, base: nn.Module, directory: Path) -> nn.Module:
        """A copy of the base with `peft`'s own adapter, at random values and saved."""
        theirs = peft.get_peft_model(copy.deepcopy(base), self.kind(**self.options))
        randomise(theirs)
        theirs.eval().save_pretrained(str(directory))
        return theirs


def ia3(model: str, target: list[str], feedforward: list[str] | str = (), **options: object) -> Trial:
    fields = {"target_modules": target, "feedforward_modules": feedforward or [], **options}
    return Trial(model, peft.IA3Config, fields)


def adalora(model: str, target: list[str], **options: object) -> Trial:
    return Trial(model, peft.AdaLoraConfig, {"target_modules": target, "total_step": 20, **options})


TRIALS = (
    adalora("gpt2", ["c_attn", "mlp.c_proj"], init_r=3),
    adalora("llama", ["q_proj", "down_proj"], bias="all", orth_reg_weight=0.1),
    adalora("bert", ["query", "dense"], lora_alpha=3, bias="lora_only", modules_to_save=["classifier"]),
    adalora("t5", ["q", "wo"], target_r=2, init_r=4),
    adalora("convnext", ["downsampling_layer.1", "pwconv2"]),
    ia3("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ia3("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ia3("llama", ["q_proj", "o_proj"], r".*layers\.1\..*o_proj"),
    ia3("bert", ["key", "value", "output.dense"], ["output.dense"], modules_to_save=["classifier"]),
    ia3("t5", ["k", "v", "wo"], ["wo"]),
    ia3("convnext", ["dwconv", "downsampling_layer.1", "pwconv2"], ["downsampling_layer.1", "pwconv2"]),
)
tried = pytest.mark.parametrize(
    "trial",
    [pytest.param(t, id=str(t), marks=() if t.model in ("bert", "convnext") else pytest.mark.slow) for t in TRIALS],
)


@tried
def test_an_adapter_crosses_in_both_directions(trial: Trial, tmp_path: Path) -> None:
    base = ZOO[trial.model].build()
    theirs = trial.adapt(base, tmp_path / "theirs")
    inputs = ZOO[trial.model].inputs(3, 5, 4, model=base)
    assert_crosses(base, tmp_path, inputs, first(theirs, inputs))


@tried
def test_merged_it_is_served_as_peft_computes_it(trial: Trial, tmp_path: Path) -> None:
    entry = ZOO[trial.model]
    base = entry.build()
    base.save_pretrained(tmp_path / "base")
    want = trial.adapt(base, tmp_path / "adapter")
    report = export_directory(
        tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=entry.task, view="forward"
    )
    assert report.merged
    check(entry, want, OnnxModel(tmp_path / "out"), base, base)


@tried
def test_gradients_are_those_of_peft(trial: Trial, tmp_path: Path) -> None:
    base = ZOO[trial.model].build()
    theirs = trial.adapt(base, tmp_path)
    ours = peftfx.load(copy.deepcopy(base), tmp_path)
    inputs = ZOO[trial.model].inputs(3, 5, 4, model=base, labels=True)
    found = []
    for model in (ours, theirs.base_model):  # without a task type a PeftModel would leave out AdaLoRA's own loss
        loss = model(**inputs).loss
        loss.backward()
        found.append(loss.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    want = sorted(p.grad.norm() for p in theirs.parameters() if p.grad is not None)
    got = sorted(p.grad.norm() for p in ours.parameters() if p.grad is not None)
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", but_for({"gpt2", "gpt_neox", "t5"}, ["gpt2", "bloom", "gpt_neox", "llama", "bert", "t5"])
)
def test_ia3_by_roles_is_saved_for_peft_parts_of_fused_weights_too(
    name: str, bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    ours = bare(name)
    ours.add_adapter("default", IA3(init_ia3_weights=False), seed=0)
    inputs = ZOO[name].inputs(2, 6, 1, model=ours.base)
    want = first(ours, inputs)
    assert {p.method.feedforward for p in ours.adapter("default").placements} == {True, False}
    ours.save_pretrained(tmp_path)
    same(first(load_peft(ZOO[name].build(), tmp_path), inputs), want)
    ours.remove()
    ours.load_adapter(tmp_path, "default")
    same(first(ours, inputs), want)
    ours.remove()


def test_layers_that_ia3_leaves_out_are_left_out_by_peft(bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    ours = bare("llama")
    rule = IA3(target_modules=["k_proj", "down_proj"], layers_to_transform=[1], init_ia3_weights=False)
    ours.add_adapter("default", rule, seed=0)
    inputs = ZOO["llama"].inputs(2, 6, 1, model=ours.base)
    ours.save_pretrained(tmp_path)
    theirs = load_peft(ZOO["llama"].build(), tmp_path)
    assert {n.split(".")[4] for n, _ in theirs.named_parameters() if "ia3_l" in n} == {"1"}
    same(first(theirs, inputs), first(ours, inputs))
    ours.remove()


def test_the_scale_of_the_input_of_a_part_cannot_be_saved(bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    ours = bare("gpt2")
    ours.add_adapter("default", IA3(target="attention.value", feedforward_modules=".*"))
    with pytest.raises(PeftfxError, match="input of some rows"):
        ours.save_pretrained(tmp_path)
    ours.remove()


def test_ia3_follows_another_adapter_at_its_site() -> None:
    llama = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(init_lora_weights=False), "first", seed=0)
    llama.add_adapter("second", IA3(target="attention.value", init_ia3_weights=False), seed=1)
    llama.set_adapter(["first", "second"])
    inputs = ZOO["llama"].inputs(model=llama.base)
    want = first(llama, inputs)
    llama.merge()
    same(first(llama.remove(), inputs), want)


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [1.0, 1e-3], ids=["rows", "rows that nearly cancel"])
def test_norms_in_pieces_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, left: float
) -> None:
    a, b = _random(4, 30).detach().to(dtype), _random(50, 4).detach().to(dtype)
    weight = (left * _random(50, 30).detach()).to(dtype) - 2 * (b @ a)
    want = torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=2), dim=1)
    monkeypatch.setattr(dora, "_PIECE", {"cpu": 100, "other": 100})  # three rows at once
    torch.testing.assert_close(updated_norms(weight, a, b, 2), want, rtol=1e-6 / left, atol=0)


def _scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, scaling: float = 0.5
) -> Tensor:
    """DoRA as the paper writes it."""
    updated = weight + scaling * (b @ a)
    return F.linear(x, gain(m, updated.norm(dim=1))[:, None] * updated, bias)


def _count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tensors of a few values treated as large ones are."""
    monkeypatch.setattr(dora, "_PIECE", {"cpu": 20, "other": 20})
    for bound in ("_LARGE", "_MANY"):
        monkeypatch.setattr(dora_layer, bound, 1)
    monkeypatch.setattr(products, "_PIECE", 4)


@pytest.mark.parametrize("count", [0, 2, 20, 64], ids=lambda count: f"{count} vectors")
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("large", [False, True], ids=["", "large"])
@pytest.mark.parametrize(("order", "scaling"), [(1, 0.5), (2, 0.5), (1, 1)])
def test_doras_layer_at_once_is_its_formula(
    monkeypatch: pytest.MonkeyPatch, count: int, biased: bool, large: bool, order: int, scaling: float
) -> None:
    """Of many vectors and of few, at magnitudes of zero too; gradients, and gradients of these."""
    if large:
        _count_as_large(monkeypatch)
    x, a, b, m = _random(1, count, 9), _random(3, 9), _random(7, 3), _random(7)
    with torch.no_grad():
        m[2], m[4] = 0, 1e-30
    weight, bias, back = _random(7, 9).detach(), _random(7).detach() if biased else None, _random(1, count, 7).detach()
    found = []
    for layer in (scaled_linear, _scaled):
        y = layer(x, weight, bias, a, b, m, scaling)
        y = y.relu() if scaling == 1 else y.relu_()  # models' code changes outputs in place too
        grads = torch.autograd.grad(y, (x, a, b, m), back, create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, a, b, m))
        found.append((y, *grads))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("count", [2, 20], ids=lambda count: f"{count} vectors")
@pytest.mark.parametrize("then", ["", "in place", "in place, of a view"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_doras_large_output_is_kept_unless_it_is_changed(
    monkeypatch: pytest.MonkeyPatch, count: int, then: str, checkpointed: bool
) -> None:
    _count_as_large(monkeypatch)
    x, a, b, m, weight = _random(1, count, 9), _random(3, 9), _random(7, 3), _random(7), _random(7, 9).detach()

    def run(layer: Callable[..., Tensor]) -> Tensor:
        y = layer(x, weight, None, a, b, m)
        if then:
            (y.flatten() if "view" in then else y).mul_(3)
        return y.sin()

    found = []
    for layer in (lambda *given: scaled_linear(*given, 0.5), _scaled):
        y = checkpoint(run, layer, use_reentrant=False) if checkpointed else run(layer)
        found.append((y, *torch.autograd.grad(y.sum(), (x, a, b, m))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "of some columns"])
def test_gradients_of_any_layout_reach_doras_large_layer(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    _count_as_large(monkeypatch)
    x, a, b, m, weight = _random(20, 9), _random(3, 9), _random(7, 3), _random(7), _random(7, 9).detach()
    backs = {
        "expanded": torch.ones(()).double().expand(20, 7),
        "transposed": _random(7, 20).detach().T,
        "of some columns": _random(20, 10).detach()[:, 2:9],
    }
    found = []
    for layer in (lambda *given: scaled_linear(*given, 0.5), _scaled):
        found.append(torch.autograd.grad(layer(x, weight, None, a, b, m), (x, a, b, m), backs[layout]))
    torch.testing.assert_close(*found)


def test_a_large_output_of_doras_layer_stays_the_only_tensor_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora_layer, "_LARGE", 0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = scaled_linear(_random(20, 9), _random(7, 9).detach(), None, _random(3, 9), _random(7, 3), _random(7), 0.5)
    assert [t.data_ptr() for t in kept if t.shape == y.shape] == [y.data_ptr()]


@pytest.mark.parametrize("frozen", ["x", "a", "b", "m"])
def test_doras_layer_at_once_has_the_gradients_that_are_asked_for(frozen: str) -> None:
    given = {"x": _random(4, 9), "a": _random(3, 9), "b": _random(7, 3), "m": _random(7)}
    given[frozen].requires_grad_(False)
    x, a, b, m = given.values()
    for layer in (lambda *given: scaled_linear(*given, 0.5), _scaled):
        layer(x, _random(7, 9).detach(), None, a, b, m).sum().backward()
    assert {name for name, tensor in given.items() if tensor.grad is None} == {frozen}


def test_doras_layer_is_not_at_once_where_a_weight_would_round_the_update_away_or_is_trained() -> None:
    x, a, weight = (_random(*shape).detach() for shape in ((4, 9), (3, 9), (7, 9)))
    assert is_scaled_at_once(x, weight, None, a)
    assert not is_scaled_at_once(x.bfloat16(), weight.bfloat16(), None, a.bfloat16())
    assert not is_scaled_at_once(x, weight.bfloat16(), None, a)
    assert not is_scaled_at_once(x, nn.Parameter(weight), None, a)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_scaled_at_once(x, weight, None, a)


@pytest.mark.skipif(version("onnxruntime").startswith("1.31."), reason="ONNX Runtime 1.31 does not open such a graph")
@pytest.mark.parametrize(
    "config",
    [peft.OFTConfig(r=0, oft_block_size=2), peft.PsoftConfig(r=1, use_cayley_neumann=True)],
    ids=["oft", "psoft"],
)
def test_a_rotation_of_one_number_has_no_entries(config: peft.PeftConfig, tmp_path: Path) -> None:
    """HF PEFT makes blocks of one number of a layer with one feature; ONNX has no list of no places."""
    torch.manual_seed(0)
    base, given = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 6)), {"input": torch.randn(3, 1)}
    config = copy.deepcopy(config)
    config.target_modules = ["0"]
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = peftfx.load(base.eval(), tmp_path / "adapter", inputs=given)
    adapted.export(tmp_path / "out", inputs=given, merge=False)
    (got,) = OnnxModel(tmp_path / "out")(**given).values()
    torch.testing.assert_close(got, theirs(given["input"]).detach(), atol=1e-5, rtol=1e-5)
