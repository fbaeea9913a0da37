"""Casts that are lost on the way from a model's code to ONNX: outputs in half precision do not show them, dtypes do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from every_model.checks import build
from torch import Tensor, fx, nn

import peftfx
from peftfx import PeftfxError
from peftfx.analysis.weight_ops import module_path
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.steps import steps
from peftfx.export.translation import stamped
from peftfx.export.verification.comparison import VerificationError, reference_of
from peftfx.export.verification.float32_twin import runnable
from peftfx.export.verification.verify import verify
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.capture import capture

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
_FAULTS: dict[str, Callable[[fx.Node], bool]] = {
    "norms": lambda node: (module_path(node) or "").endswith("norm"),
    "angles": lambda node: node.target in (aten.cos.default, aten.sin.default),
    "scores": lambda node: node.target is aten.softmax.int,
}


def lose_casts(graph: Graph, lost: Callable[[fx.Node], bool], kind: torch.dtype) -> int:
    """Take casts to float32 out of a graph, and compute in `kind` what was computed behind them; return how many."""
    rewriter, touched, count = Rewriter(graph.module.graph), set[fx.Node](), 0
    for node in list(graph.nodes()):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if value.dtype == torch.float32 and lost(node) and not touched.intersection(node.all_input_nodes):
            if node.target is aten._to_copy.default and node.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]
                count, node.kwargs = count + 1, {**node.kwargs, "dtype": kind}
            elif node.target is aten.to.dtype and node.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]
                count, node.args = count + 1, (node.args[0], kind, *node.args[2:])
            elif node.target in (aten.cos.default, aten.sin.default):
                narrow = rewriter.before(node).call(aten._to_copy.default, node.args[0], dtype=kind)
                count, node.args = count + 1, (narrow,)
            elif node.target is aten.softmax.int:
                count, node.args = count + 1, node.args[:2]
        if _again(rewriter, node) != value.dtype:
            touched.add(node)
    return count


def _again(rewriter: Rewriter, node: fx.Node) -> torch.dtype:
    with contextlib.suppress(RuntimeError, TypeError):
        rewriter.update(node, node.target, *node.args, **node.kwargs)
    return node.meta["val"].dtype  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "lost", "kind"),
    [
        ("llama", "norms", torch.float16),
        ("llama", "angles", torch.bfloat16),
        ("qwen3_moe", "scores", torch.float16),
        pytest.param("llama", "norms", torch.bfloat16, marks=pytest.mark.further),
        pytest.param("llama", "angles", torch.float16, marks=pytest.mark.further),
        pytest.param("qwen3_moe", "scores", torch.bfloat16, marks=pytest.mark.further),
    ],
)
def test_a_cast_that_is_lost_in_the_translation_is_refused(
    model: str, lost: str, kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, prepare = list[int](), stamped.prepare

    def losing(graph: Graph) -> Graph:
        ready = prepare(graph)
        counts.append(lose_casts(ready, _FAULTS[lost], kind))
        return ready

    monkeypatch.setattr(stamped, "prepare", losing)
    with pytest.raises(PeftfxError, match="lost its dtype"):
        peftfx.export_onnx(build("text-generation", model).to(kind), tmp_path / "out", optimize="none")
    assert counts[0] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lost", "kind", "more"),
    [
        ("norms", torch.bfloat16, {}),
        pytest.param("angles", torch.float16, {}, marks=pytest.mark.further),
        pytest.param("norms", torch.float16, {}, marks=pytest.mark.further),
        pytest.param("angles", torch.bfloat16, {}, marks=pytest.mark.further),
        pytest.param("norms", torch.float16, {"slots": "all-linear"}, marks=pytest.mark.further),
    ],
)
def test_a_cast_that_is_lost_in_the_capture_is_refused(
    lost: str, kind: torch.dtype, more: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, counts = steps.ExportSteps.captured, list[int]()

    def losing(self: steps.ExportSteps) -> tuple[steps.ExportSteps, list[GraphPart]]:
        work, parts = captured(self)
        for part in parts:
            counts.append(lose_casts(part.graph, _FAULTS[lost], kind))
            part.graph.module.recompile()
        return work, parts

    monkeypatch.setattr(steps.ExportSteps, "captured", losing)
    with pytest.raises(PeftfxError, match="a cast was lost in the capture"):
        peftfx.export_onnx(build("text-generation", "llama").to(kind), tmp_path / "out", **more)  # type: ignore[arg-type]
    assert counts[0] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("llama", torch.bfloat16), ("gemma2", torch.float16)),
        pytest.param("llama", torch.float16, marks=pytest.mark.further),
        pytest.param("gemma2", torch.bfloat16, marks=pytest.mark.further),
        *(
            pytest.param(model, kind, marks=pytest.mark.further)
            for model in ("bloom", "gpt_oss", "helium")
            for kind in HALVES
        ),
    ],
)
def test_a_captured_graph_rounds_where_the_models_code_does(model: str, kind: torch.dtype) -> None:
    """To the bit: so a capture loses no cast."""
    base = build("text-generation", model).to(kind)
    adapted = peftfx.transform(base, peftfx.LoRA(r=4, target="all-linear", init_lora_weights=False))
    view = adapted.view("decode")
    assert view is not None
    graph, inputs = adapted.graph(view=view), view.inputs(base, sizes={"batch": 2, "sequence": 7, "past": 0})
    with torch.no_grad():
        logits = adapted(**{n: v for n, v in inputs.items() if not n.startswith("past")}, use_cache=False).logits
    assert reference_of(graph)(inputs)["logits"].equal(logits)


class Cancels(nn.Module):
    """Adds a large number and takes it away again, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).float()
        return (h + 1000.0 - 1000.0).to(x.dtype)


def _in_bfloat16(path: Path, *, all_of_it: bool) -> None:
    """Spoil a file: a value in float32 becomes one in bfloat16, or all do, and so fits its neighbours."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for a in node.attribute:
            if a.name == "to" and a.i == onnx.TensorProto.FLOAT:
                a.i = onnx.TensorProto.BFLOAT16
            if all_of_it and a.name == "value" and a.t.data_type == onnx.TensorProto.FLOAT:
                number = onnx.numpy_helper.to_array(a.t).astype(float)
                a.t.CopyFrom(onnx.helper.make_tensor(a.t.name, onnx.TensorProto.BFLOAT16, number.shape, number.ravel()))
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    onnx.save(model, path)


def test_the_twin_of_a_bfloat16_model_rounds_as_the_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Cancels().eval().bfloat16(), torch.randn(2, 8).bfloat16()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x}, optimize="none")
    reference = reference_of(capture(model, {"x": x}))
    verify(tmp_path / "out", reference, [{"x": x}], atol=None, rtol=None)
    _in_bfloat16(tmp_path / "out" / "model.onnx", all_of_it=True)
    with pytest.raises(VerificationError, match="disagrees"):
        verify(tmp_path / "out", reference, [{"x": x}], atol=None, rtol=None)


def test_a_bfloat16_model_whose_types_do_not_fit_is_refused(tmp_path: Path) -> None:
    """The CPU has no kernels for it, but knows that no provider takes it."""
    model, x = Cancels().eval().bfloat16(), torch.randn(2, 8).bfloat16()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x}, optimize="none")
    _in_bfloat16(tmp_path / "out" / "model.onnx", all_of_it=False)
    with (
        pytest.raises(VerificationError, match="ONNX Runtime refuses the model"),
        runnable(tmp_path / "out" / "model.onnx"),
    ):
        pass


class Scaled(nn.Module):
    """Multiplies by a number that half precision lacks, as `1 / sqrt(width)` is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return h * 0.28867513459481287, h / 0.7


@pytest.mark.parametrize("kind", HALVES)
def test_numbers_that_multiply_half_precision_are_not_rounded(kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Scaled().eval().to(kind), (torch.randint(-8, 9, (64, 8)) / 4).to(kind)
    with torch.no_grad():  # whole numbers: the product is exact in both
        model.first.weight.copy_(torch.randint(-2, 3, (8, 8)))
        model.first.bias.copy_(torch.randint(-2, 3, (8,)))
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x[:3]})
    with runnable(tmp_path / "out" / "model.onnx") as (path, widened), torch.no_grad():
        got = OnnxModel(path)(x=x.float() if widened else x)
        for own, want in zip(got.values(), model(x), strict=True):
            assert own.equal(want.to(own.dtype))
