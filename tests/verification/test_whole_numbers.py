"""Outputs that are no floating-point numbers: equal in float32, and else where nothing is rounded."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.export.steps import verification
from peftfx.export.translation import stamped
from peftfx.export.verification.comparison import VerificationError
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter


class Classes(nn.Module):
    """Gives the most likely of 400 classes, and whether it is likely at all; two are often nearly as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 400)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.outer(torch.relu(self.inner(x)))
        return {"logits": logits, "classes": logits.argmax(-1), "likely": logits.softmax(-1).amax(-1) > 0.004}


@pytest.mark.filterwarnings("ignore:bfloat16")
@pytest.mark.parametrize(
    "options", [{"quantize": "int4"}, {"quantize": "int8", "max_error": 0.5}, "float16", "bfloat16"]
)
def test_near_ties_that_rounding_decides_are_no_error(options: Any, tmp_path: Path) -> None:
    """They were refused: the class may differ by 0, with a tolerance of 1e+30 times the largest magnitude."""
    torch.manual_seed(1)
    classes, dtype = Classes().eval(), torch.float32
    if isinstance(options, str):
        options, dtype = {}, getattr(torch, options)
    x = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    told = pytest.warns(PeftfxWarning, match="classes, likely: only shapes") if options else nullcontext()
    with told:
        report = peftfx.export_onnx(classes.to(dtype), tmp_path / "out", inputs={"x": x}, **options)
    assert {c["output"] for c in report.comparisons} == {"logits"}
    if dtype != torch.bfloat16:
        session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x.numpy()}), strict=True))
        want = classes(x)
        assert (torch.from_numpy(found["classes"]) == want["classes"]).double().mean() > 0.8
        assert (found["classes"].dtype, found["likely"].dtype) == ("int64", "bool")


def _least_likely(graph: Graph) -> Graph:
    """Make the graph give the least likely class, in place."""
    rewriter = Rewriter(graph.module.graph)
    (best,) = (n for n in graph.nodes() if n.target is torch.ops.aten.argmax.default)
    (logits, *others) = best.args
    best.args = (rewriter.before(best).call(torch.ops.aten.neg.default, logits), *others)
    graph.module.recompile()
    return graph


def test_wrong_ones_in_half_precision_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared where ONNX Runtime and torch round nothing, or as they are if torch cannot do that."""
    prepare = stamped.prepare
    monkeypatch.setattr(stamped, "prepare", lambda graph: _least_likely(prepare(graph)))
    x = torch.randn(3, 40, 32).half()
    with pytest.raises(VerificationError, match=r"without rounding to half precision(.|\n)*classes"):
        peftfx.export_onnx(Classes().eval().half(), tmp_path / "out", inputs={"x": x})
    monkeypatch.setattr(verification, "hold_without_rounding", lambda *_, **__: False)
    with pytest.raises(VerificationError, match=r"disagrees with the reference(.|\n)*classes"):
        peftfx.export_onnx(Classes().eval().half(), tmp_path / "out", inputs={"x": x})


def _narrow(graph: Graph) -> Graph:
    """Make the graph give its classes in 32 bits, in place."""
    rewriter = Rewriter(graph.module.graph)
    (best,) = (n for n in graph.nodes() if n.target is torch.ops.aten.argmax.default)
    narrow = rewriter.after(best).call(torch.ops.aten._to_copy.default, best, dtype=torch.int32)
    (output,) = (n for n in graph.nodes() if n.op == "output")
    output.args = (tuple(narrow if value is best else value for value in output.args[0]),)
    graph.module.recompile()
    return graph


def _wide(graph: Graph) -> Graph:
    """Make the graph give its logits in float32, in place."""
    rewriter = Rewriter(graph.module.graph)
    (output,) = (n for n in graph.nodes() if n.op == "output")
    logits, *others = output.args[0]
    wide = rewriter.after(logits).call(torch.ops.aten._to_copy.default, logits, dtype=torch.float32)
    output.args = ((wide, *others),)
    graph.module.recompile()
    return graph


@pytest.mark.filterwarnings("ignore:bfloat16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_of_another_precision_are_an_error(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were compared by their values alone, as a bfloat16 model runs as its twin in float32."""
    prepare = stamped.prepare
    monkeypatch.setattr(stamped, "prepare", lambda graph: _wide(prepare(graph)))
    with pytest.raises(VerificationError, match=f"logits: float32, not {str(dtype).removeprefix('torch.')}"):
        peftfx.export_onnx(Classes().eval().to(dtype), tmp_path / "out", inputs={"x": torch.randn(3, 40, 32).to(dtype)})


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
def test_numbers_of_another_dtype_are_an_error(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were compared by their values alone."""
    prepare = stamped.prepare
    monkeypatch.setattr(stamped, "prepare", lambda graph: _narrow(prepare(graph)))
    with pytest.raises(VerificationError, match="classes: int32, not int64"):
        peftfx.export_onnx(Classes().eval(), tmp_path / "out", inputs={"x": torch.randn(3, 40, 32)}, **options)


class Order(Classes):
    """Gives the order of all 400 classes, in which two are often nearly as likely, and the logits."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)["logits"]
        return {"logits": logits, "order": logits.argsort(-1)}


@pytest.mark.further
def test_an_order_that_rounding_decides_in_float32_is_told(tmp_path: Path) -> None:
    """The hint named tolerances, which whole numbers have none of."""
    torch.manual_seed(1)
    with pytest.raises(VerificationError, match="order: ") as error:
        peftfx.export_onnx(Order().eval(), tmp_path / "out", inputs={"x": torch.randn(3, 400, 32)}, atol=1e-4)
    assert error.value.hint.startswith("whole numbers have to be equal")


def test_an_order_of_near_ties_is_that_of_onnx_runtimes_own_scores(tmp_path: Path) -> None:
    """It was refused, as torch puts some of them otherwise."""
    torch.manual_seed(1)
    model, x = Order().eval(), torch.randn(3, 400, 32)
    report = peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x})
    assert {c["output"] for c in report.comparisons} == {"logits", "order"}
    x = torch.randn(40, 400, 32)
    got = peftfx.export.OnnxModel(tmp_path / "out")(x=x)
    assert got["logits"].gather(-1, got["order"]).diff(dim=-1).amin() >= 0
    assert 0.9 < (got["order"] == model(x)["order"]).double().mean() < 1


def _backwards(graph: Graph) -> Graph:
    """Make the graph swap the last two of its order, in place."""
    rewriter = Rewriter(graph.module.graph)
    (order,) = (n for n in graph.nodes() if n.target is torch.ops.aten.argsort.default)
    swapped = rewriter.after(order).trace(lambda x: torch.cat([x[..., :-2], x[..., -2:].flip(-1)], -1), order)
    (output,) = (n for n in graph.nodes() if n.op == "output")
    output.args = (tuple(swapped if value is order else value for value in output.args[0]),)
    graph.module.recompile()
    return graph


@pytest.mark.further
def test_a_wrong_order_is_seen_beside_near_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = stamped.prepare
    monkeypatch.setattr(stamped, "prepare", lambda graph: _backwards(prepare(graph)))
    torch.manual_seed(1)
    with pytest.raises(VerificationError, match="order: "):
        peftfx.export_onnx(Order().eval(), tmp_path / "out", inputs={"x": torch.randn(3, 400, 32)})
