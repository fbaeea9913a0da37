"""Beside its rounding, a graph with rounded weights computes what torch does with the numbers of its codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from support.zoo import ZOO
from torch import nn

import peftfx
from peftfx.export import quantised
from peftfx.export.verification.comparison import VerificationError

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


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (_swapped, "beside the rounding of its weights"),
        (_exchanged, "stand for another weight"),
        (_larger, "beside the rounding of its weights"),
    ],
)
def test_a_fault_in_one_layer_is_seen(
    fault: Callable[[ir.Model], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until now it was a part of what rounding costs."""
    quantize = quantised.quantize

    def faulty(model: ir.Model, *args: object) -> dict[str, list[str]]:
        done = quantize(model, *args)
        fault(model)
        return done

    monkeypatch.setattr(quantised, "quantize", faulty)
    with pytest.raises(VerificationError, match=told):
        peftfx.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward", quantize="int4")
    assert not list(tmp_path.iterdir())


class Two(nn.Module):
    """A layer that is stored [in, out], a square one, a bias, and a width that is no whole number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(70, 96), nn.Linear(96, 96), nn.Linear(96, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.relu(x @ self.one.weight.T) @ self.two.weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two", {"quantize": "int4(symmetric=False)"}),
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
            )
        ),
    ],
)
def test_right_ones_are_held_to_their_codes(
    name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, given = (Two(), {"inputs": {"x": torch.randn(5, 70)}}) if name == "two" else (ZOO[name].build(), {})
    adapted = peftfx.transform(model.eval(), LORA, **given)
    report = adapted.export(tmp_path / "out", **options)
    assert "codes" not in report.reference  # nothing was left out of the comparison


def test_what_is_not_held_to_its_codes_is_told(tmp_path: Path) -> None:
    model = ZOO["llama"].build().half()
    report = peftfx.export_onnx(model, tmp_path / "out", view="forward", quantize="int4")
    assert report.reference.endswith("model.onnx is not held to its codes, as it computes in half precision")
