"""torch's recurrent layers: one operator for every length, in captures and in ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel, export_onnx

LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, two layers, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "LSTM without a bias": (nn.LSTM, {"bias": False, "batch_first": True, "dropout": 0.5, "num_layers": 2}),
    "GRU": (nn.GRU, {"batch_first": True}),
    "GRU, two layers, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "GRU without a bias": (nn.GRU, {"bias": False}),
    "RNN": (nn.RNN, {"batch_first": True}),
    "RNN, ReLU, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


class Recurrent(nn.Module):
    """A layer under an adapter, a recurrent layer, and a head; it goes on from a state, if there is one."""

    def __init__(self, kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.cell = nn.Linear(5, 4), kind(4, 6, **options)
        self.out = nn.Linear(6 * (1 + self.cell.bidirectional), 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Any, ...]:
        y, last = self.cell(self.up(x), state)
        return (self.out(y), last)


@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_every_length_is_exported(kind: type[nn.RNNBase], options: dict[str, Any], tmp_path: Path) -> None:
    base = Recurrent(kind, options).eval()
    rules = peftfx.LoRA(r=2, target_modules=["up", "out"], init_lora_weights=False)
    adapted = peftfx.transform(base, rules, inputs={"x": torch.randn(2, 7, 5)})
    report = adapted.export(tmp_path / "out")
    assert (report.sizes, report.engine) == ([], "fast")
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    layers = base.cell.num_layers * (1 + base.cell.bidirectional)
    assert kinds.count(kind.__name__) == layers
    served = OnnxModel(tmp_path / "out")
    for first, second in ((1, 1), (3, 4), (2, 12), (5, 2)):
        x = torch.randn(first, second, 5)
        y, last = adapted(x)
        want = [y, *(last if isinstance(last, tuple) else [last])]
        for got, value in zip(served(x=x).values(), want, strict=True):
            torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_batch_without_rows_does_not_end_the_process(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    export_onnx(Recurrent(kind, {"batch_first": True}).eval(), tmp_path / "out", inputs={"x": torch.randn(2, 7, 5)})
    with pytest.raises(PeftfxError, match="ONNX Runtime refuses"):
        OnnxModel(tmp_path / "out")(x=torch.randn(0, 4, 5))


@torch.no_grad()
def test_a_state_is_taken(tmp_path: Path) -> None:
    base = Recurrent(nn.LSTM, {"batch_first": True}).eval()

    def call(batch: int, length: int) -> dict[str, Any]:
        return {"x": torch.randn(batch, length, 5), "state": (torch.randn(1, batch, 6), torch.randn(1, batch, 6))}

    export_onnx(base, tmp_path / "out", inputs=call(2, 7))
    case = call(3, 4)
    got = OnnxModel(tmp_path / "out")(**{"x": case["x"], "state.0": case["state"][0], "state.1": case["state"][1]})
    y, (hidden, cell) = base(**case)
    for name, value in zip(got, (y, hidden, cell), strict=True):
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_without_kernels_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = Recurrent(nn.GRU, {}).eval().to(dtype)
    with pytest.raises(PeftfxError, match=r"recurrent layers in float32, not in float\d\d \[cell\]"):
        export_onnx(base, tmp_path / "out", inputs={"x": torch.randn(7, 2, 5).to(dtype)})


def test_a_projection_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 6, proj_size=3)).eval()
    with pytest.raises(PeftfxError, match=r"proj_size.*\[1\]"):
        export_onnx(base, tmp_path / "out", inputs={"input": torch.randn(7, 2, 5)})


@pytest.mark.parametrize("opset", [18, 25])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    base = Recurrent(nn.GRU, {"bidirectional": True}).eval()
    report = export_onnx(base, tmp_path / "out", inputs={"x": torch.randn(2, 7, 5)}, opset=opset)
    assert (report.opset, report.sizes) == (opset, [])


@pytest.mark.parametrize(("kind", "options"), [*LAYERS.values()][:5], ids=[*LAYERS][:5])
def test_gradients_on_the_graph_road_are_those_of_the_model(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    x = torch.randn(3, 4, 5)
    found = {}
    for road in ("graph", "modules"):
        rules = peftfx.LoRA(r=2, target_modules=["up"])
        model = peftfx.transform(Recurrent(kind, options), rules, inputs={"x": x}, road=road, seed=0).eval()
        with torch.no_grad():
            for name, parameter in model.adapters.named_parameters():
                if name.endswith("B"):
                    parameter.fill_(0.1)
        model(x)[0].square().sum().backward()
        found[road] = [parameter.grad for parameter in model.adapters.parameters()]
    for got, want in zip(found["graph"], found["modules"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Packed(nn.Module):
    """Rows that are packed by their lengths before a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(rows)[0], batch_first=True)[0]


def test_rows_packed_by_their_lengths_are_refused_by_name() -> None:
    inputs = {"x": torch.randn(2, 5, 4), "lengths": torch.tensor([5, 3])}
    with pytest.raises(PeftfxError, match="its code packs rows by their lengths"):
        peftfx.transform(Packed(), peftfx.LoRA(target_modules=["first"]), inputs=inputs, road="graph")
