"""Beside its rounding, a graph with rounded weights computes what torch does with the numbers of its codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from every_model.checks import build
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.adapters.recipes import Derived, Own
from peftfx.export import quantised
from peftfx.export.rounding import before_rounding
from peftfx.export.rounding.before_rounding import hold_merged
from peftfx.export.steps import verification
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.graph.graph import Graph
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.base import PassResult

SMALL = "int4(block=16)"
MERGE = Merge.__call__
LORA = peftfx.LoRA(r=2, target="all-linear", init_lora_weights=False)


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("MatMulNBits", "MatMulBnb4")]


def _swapped(model: ir.Model) -> None:
    """Let the products of two layers of one size read each other's codes."""
    first, *rest = _products(model)
    other = next(node for node in rest if node.inputs[1].shape == first.inputs[1].shape)
    for place in (1, 2):
        one, two = first.inputs[place], other.inputs[place]
        first.replace_input_with(place, two)
        other.replace_input_with(place, one)


def _exchanged(model: ir.Model) -> None:
    """Give the codes of two layers of one size each other's values."""
    first, *rest = _products(model)
    other = next(node for node in rest if node.inputs[1].shape == first.inputs[1].shape)
    for place in (1, 2):
        one, two = first.inputs[place], other.inputs[place]
        one.const_value, two.const_value = two.const_value, one.const_value


def _larger(model: ir.Model) -> None:
    """Make the result of one layer larger by 1 in 1000."""
    node = _products(model)[0]
    result = node.outputs[0]
    factor = ir.Value(name="factor", type=ir.TensorType(result.dtype), const_value=ir.tensor([1.001], name="factor"))
    model.graph.initializers["factor"] = factor
    more = ir.node("Mul", [result, factor])
    more.outputs[0].name, more.outputs[0].type, more.outputs[0].shape = "more", result.type, result.shape
    result.replace_all_uses_with(more.outputs[0])
    more.replace_input_with(0, result)
    model.graph.insert_after(node, more)


def _spoil(fault: Callable[[ir.Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each export have a fault in its rounded program."""
    quantize = quantised.quantize

    def faulty(program: ir.Model, *args: object) -> dict[str, list[str]]:
        done = quantize(program, *args)
        fault(program)
        return done

    monkeypatch.setattr(quantised, "quantize", faulty)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (_swapped, "apart from the rounding of its weights"),
        (_exchanged, "stand for another weight"),
        (_larger, "apart from the rounding of its weights"),
    ],
)
def test_a_fault_in_one_layer_is_seen(
    fault: Callable[[ir.Model], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until now it was a part of what rounding costs."""
    _spoil(fault, monkeypatch)
    with pytest.raises(VerificationError, match=told):
        peftfx.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward", quantize="int4")
    assert not list(tmp_path.iterdir())


class Two(nn.Module):
    """A layer stored [in, out], a square one, a bias, a width that is no whole number of blocks, and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(70, 96), nn.Linear(96, 96), nn.Linear(96, 50)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.three(torch.relu(x @ self.one.weight.T) @ self.two.weight)
        return y, y > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two", {"quantize": "int4(symmetric=False)"}),
        ("half", {"quantize": SMALL}),
        *(
            pytest.param(*given, marks=pytest.mark.further)
            for given in (
                ("two", {"quantize": "int8(block=16)"}),
                ("two", {"quantize": "nf4"}),
                ("gpt2", {"quantize": "int4(block=16); int8@head"}),
                ("gpt2", {"quantize": "nf4"}),
                ("t5", {"quantize": "int4(block=16)"}),
                ("llama", {"quantize": "int8", "view": "decode"}),
                ("bert", {"quantize": "int4"}),
                ("experts", {"quantize": SMALL, "view": "forward"}),
            )
        ),
    ],
)
def test_right_ones_are_held_to_their_codes(
    name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    own = {"half": lambda: ZOO["bert"].build().half(), "experts": lambda: build("text-generation", "mixtral").half()}
    model = Two() if name == "two" else own.get(name, lambda: ZOO[name].build())()
    given = {"inputs": {"x": torch.randn(5, 70)}} if name == "two" else {}
    adapted = peftfx.transform(model.eval(), LORA, **given)
    report = adapted.export(tmp_path / "out", **options)
    assert "codes" not in report.reference  # nothing was left out of the comparison


def _dropped(model: ir.Model) -> None:
    """Leave out a layer."""
    node = next(n for n in _products(model) if n.inputs[0].shape == n.outputs[0].shape)
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def _doubled(model: ir.Model) -> None:
    """Double the scale of one block."""
    scales = next(v for name, v in model.graph.initializers.items() if name.endswith(".scales"))
    read = scales.const_value

    def wrong() -> ir.TensorProtocol:
        numbers = read.numpy().copy()
        numbers[-1, -1] *= 2
        return ir.tensor(numbers, name=scales.name)

    scales.const_value = ir.LazyTensor(wrong, dtype=read.dtype, shape=read.shape, name=scales.name)


@pytest.mark.parametrize(
    ("model_type", "half", "fault", "told"),
    [
        ("bert", True, _dropped, "apart from the rounding of its weights, without rounding to half precision"),
        ("bert", False, _doubled, r"^1 blocks of .* are further from the weight than rounding leaves them"),
        pytest.param("qwen3_moe", False, _dropped, "apart from the rounding", marks=pytest.mark.further),
        pytest.param("qwen3_moe", True, _doubled, "^1 blocks of ", marks=pytest.mark.further),
    ],
)
def test_half_precision_experts_and_each_block_are_held(
    model_type: str,
    half: bool,
    fault: Callable[[ir.Model], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs in half precision and stacks of experts were not held to their codes, nor codes to their weights."""
    model = ZOO["bert"].build() if model_type == "bert" else build("text-generation", model_type)
    model = model.half() if half else model
    _spoil(fault, monkeypatch)
    with pytest.raises(VerificationError, match=told):
        peftfx.export_onnx(model, tmp_path / "out", view="forward", quantize=SMALL)


def _lost(self: Merge, graph: Graph) -> PassResult:
    """Merge, and lose the update of one layer."""
    result = MERGE(self, graph)
    name, recipe = next((n, r) for n, r in result.graph.derived.items() if isinstance(r, Derived))
    result.graph.derived[name] = Own(recipe.folding.weight)
    return result


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        pytest.param(torch.float32, {"quantize": SMALL}, marks=pytest.mark.further),
        pytest.param(torch.float16, {"quantize": SMALL}, marks=pytest.mark.further),
    ],
)
def test_a_lost_update_of_one_layer_is_seen(
    dtype: torch.dtype, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was less than what rounding the merged weights costs."""
    monkeypatch.setattr(Merge, "__call__", _lost)
    adapted = peftfx.transform(ZOO["bert"].build().to(dtype), peftfx.LoRA(r=2, target="all-linear"))
    for name, parameter in adapted.adapters.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with pytest.raises(VerificationError, match="of the merged model, before its weights are rounded"):
        adapted.export(tmp_path / "out", merge=True, **options)
    assert not list(tmp_path.iterdir())


class Sensitive(nn.Module):
    """Layers each of which makes a small difference larger."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return x


def test_a_deep_model_may_multiply_what_folding_its_weights_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused as a wrong merge; a lost update is still seen."""
    torch.manual_seed(0)
    call = {"x": torch.randn(4, 8)}
    apart = peftfx.transform(Sensitive(), LORA, inputs=call, seed=0).eval().graph()
    merged = Merge()(apart).graph
    assert hold_merged(apart, merged, call, "here", small=True)
    monkeypatch.setattr(before_rounding, "_NEAR", 0)
    with pytest.raises(VerificationError, match=r"is (0\.00\d+|.*e-05) of its largest magnitude off"):
        hold_merged(apart, merged, call, "here", small=True)
    monkeypatch.undo()
    with pytest.raises(VerificationError, match="before its weights are rounded"):
        hold_merged(apart, _lost(Merge(), apart).graph, call, "here", small=True)


def test_a_quantised_graph_is_held_to_the_models_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured wrongly was held to itself alone."""
    eager = EagerReference.__call__
    monkeypatch.setattr(
        EagerReference, "__call__", lambda self, feed: {n: 1.001 * v for n, v in eager(self, feed).items()}
    )
    with pytest.raises(VerificationError, match="before its weights are rounded, the graph disagrees"):
        peftfx.export_onnx(ZOO["bert"].build(), tmp_path / "out", quantize=SMALL)


def test_what_is_not_held_to_its_codes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "runs_exactly", lambda _: False)
    report = peftfx.export_onnx(ZOO["bert"].build().half(), tmp_path / "out", quantize=SMALL)
    assert report.reference.endswith("as it computes in half precision, and is too large to run in float64")
