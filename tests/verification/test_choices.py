"""Verification of models that choose experts: choices between nearly equal scores are followed, faults are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.verification import choices as choosing
from peftfx.export.verification import verify as verification
from peftfx.export.verification.comparison import Comparison
from peftfx.export.verification.verify import verify

SPOIL = Callable[[onnx.GraphProto], None]


class Mixture(nn.Module):
    """Two layers of four experts each; a token goes to the two with the largest scores."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(16, 4) for _ in range(2))
        self.experts = nn.ParameterList(torch.randn(4, 16, 16) / 4 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for router, experts in zip(self.routers, self.experts, strict=True):
            weights, places = router(x).float().softmax(-1).topk(2, -1)
            found = (experts[places] @ x[..., None, :, None]).squeeze(-1)
            x = x + (found * weights[..., None].to(x.dtype)).sum(-2)
        return x


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    torch.manual_seed(0)
    return Mixture().half().eval()


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Tensor]]:
    """Texts of many tokens, so that some scores are nearly equal."""
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 150, 16).half()} for _ in range(3)]


@pytest.fixture
def saved(mixture: Mixture, tmp_path: Path) -> Path:
    peftfx.export_onnx(mixture, tmp_path / "out", inputs={"x": torch.randn(2, 5, 16).half()})
    return tmp_path / "out"


def compared(saved: Path, mixture: Mixture, calls: list[dict[str, Tensor]]) -> list[Comparison]:
    def reference(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": mixture(feed["x"])}

    return verify(saved, reference, calls, atol=None, rtol=None)


def test_choices_between_nearly_equal_scores_are_followed(
    saved: Path, mixture: Mixture, calls: list[dict[str, Tensor]]
) -> None:
    found = compared(saved, mixture, calls)
    assert len(found) == 3
    assert max(c.max_rel for c in found) < 5e-3, "the reference went on with the same experts"
    assert max(c.bound / c.largest for c in found) < 0.05, "and so did float64"
    assert not list(saved.glob(".*")), "no file is left behind"


def test_without_that_another_choice_in_float64_hides_faults(
    saved: Path, mixture: Mixture, calls: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def none(path: Path) -> Iterator[None]:
        yield None

    monkeypatch.setattr(verification, "shown_choices", none)
    with pytest.warns(PeftfxWarning, match="the comparison of output says little: it may differ by"):
        assert max(c.bound / c.largest for c in compared(saved, mixture, calls)) > 0.5


def initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(t for t in graph.initializer if name in t.name)


def add(name: str, change: float) -> SPOIL:
    def spoil(graph: onnx.GraphProto) -> None:
        tensor = initializer(graph, name)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] += change
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))

    return spoil


def smallest(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "TopK":
            kept = [a for a in node.attribute if a.name != "largest"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("largest", 0)])


def exchanged(graph: onnx.GraphProto) -> None:
    """The second layer is routed by the first one's scores."""
    first, second = (node for node in graph.node if node.op_type == "TopK")
    second.input[0] = first.input[0]


@pytest.mark.parametrize(
    "spoil",
    [add("routers.1.bias", 0.02), add("routers.0.weight", 0.03), add("experts.1", 0.2), smallest, exchanged],
    ids=["a bias of scores", "a router", "an expert", "the smallest scores", "another layer's scores"],
)
def test_faults_before_at_and_behind_choices_are_refused(
    spoil: SPOIL, saved: Path, mixture: Mixture, calls: list[dict[str, Tensor]]
) -> None:
    path = saved / "model.onnx"
    proto = onnx.load(path)
    spoil(proto.graph)
    onnx.save(proto, path)
    with pytest.raises(PeftfxError, match="ONNX Runtime disagrees"):
        compared(saved, mixture, calls)


def test_axes_that_an_output_does_not_have_are_refused(
    saved: Path, mixture: Mixture, calls: list[dict[str, Tensor]]
) -> None:
    proto = onnx.load(saved / "model.onnx")
    output = proto.graph.output[0].type.tensor_type.shape.dim
    output[0].dim_param, output[1].dim_param = output[1].dim_param, output[0].dim_param
    onnx.save(proto, saved / "model.onnx")
    with pytest.raises(PeftfxError, match=r"declares output \['x.1', 'batch', 16\]"):
        compared(saved, mixture, calls)


@pytest.mark.parametrize("inside", [False, True])
def test_a_branch_that_makes_no_choice_hides_none(inside: bool, tmp_path: Path) -> None:
    """A loop over tokens, as of linear attention, beside routers: their choices are followed."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    half, number = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    made = node("TopK", ["x", "k"], ["y", "at"]) if inside else node("Identity", ["x"], ["y"])
    body = onnx.helper.make_graph([made], "body", [], [value("y", half, None)])
    nodes = [
        node("TopK", ["x", "k"], ["values", "places"]),
        node("If", ["is"], ["z"], then_branch=body, else_branch=body),
    ]
    inputs = [value("x", half, [4]), value("k", number, [1]), value("is", onnx.TensorProto.BOOL, [])]
    graph = onnx.helper.make_graph(nodes, "main", inputs, [value("z", half, None)], value_info=[inputs[0]])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with choosing.shown_choices(tmp_path / "model.onnx") as found:
        assert (found is None) == inside


def test_scores_of_padding_are_not_compared() -> None:
    scores, places = torch.arange(24.0).view(6, 4), torch.zeros(6, 1, dtype=torch.long)
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])  # one token in the past
    other = scores.clone()
    other[3] += 9
    for feed, far in (({"input_ids": ids, "attention_mask": mask}, False), ({"input_ids": ids}, True)):
        near = choosing.Nearness()
        near.learn([choosing.TakenChoice(other, places)], {0: scores}, {0: scores}, feed)
        assert bool(near.too_far) == far
