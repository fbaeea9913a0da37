"""Sizes: a program is used only where it is what the model's code computes, and an export says where that is."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import transformers
from support.zoo import ZOO
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export.onnx_directory import export_onnx
from peftfx.export.verification.sizes import trial
from peftfx.model.adapted import AdaptedModel
from peftfx.views.capture import capture


class Branching(nn.Module):
    """A linear layer, and code that computes something else on one side of `branch`."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.branch = nn.Linear(4, 4), branch

    def forward(self, x: Tensor) -> Tensor:
        batch, n = x.shape[:2]
        y = self.layer(x)
        return y * 3 if eval(self.branch, {"batch": batch, "n": n}) else y


class Joined(nn.Module):
    """Two inputs whose second axes have to be equal, and a table that ends at 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(16, 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x + self.table[: x.shape[1]]) * mask[..., None]


def adapted_on(model: nn.Module, **inputs: Tensor) -> AdaptedModel:
    """On the graph road: inside the model's own modules, its code branches by itself."""
    rules = peftfx.LoRA(r=2, target="head")
    adapted = peftfx.transform(model.eval(), rules, inputs=inputs, seed=0, road="graph")
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    return adapted


def by_hand(adapted: AdaptedModel, x: Tensor) -> Tensor:
    """The eager model with the low-rank product added to its layer's weight."""
    tensors = adapted.adapter("default").state_dict()
    a, b = (next(t for key, t in tensors.items() if key.endswith(end)) for end in ("A", "B"))
    scale = 8 / 2
    changed = Branching(adapted.base.branch)  # type: ignore[arg-type]
    changed.load_state_dict(adapted.base.state_dict())
    with torch.no_grad():
        changed.layer.weight += scale * b @ a
        return changed.eval()(x)


BRANCHES = ["n > 8", "n == 1", "batch == 1", "n % 2 == 0", "n // 2 == 3", "n > 3 and batch > 2", "n >= 2 * batch"]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_call_takes_the_branch_of_its_own_sizes(branch: str) -> None:
    adapted = adapted_on(Branching(branch), x=torch.zeros(2, 5, 4))
    for batch, n in ((2, 5), (1, 5), (2, 1), (1, 1), (3, 6), (2, 8), (2, 9), (3, 12)):
        x = torch.randn(batch, n, 4)
        torch.testing.assert_close(adapted(x).detach(), by_hand(adapted, x), atol=1e-5, rtol=1e-5)


def test_graphs_of_other_branches_are_kept_and_are_few() -> None:
    adapted = adapted_on(Branching("n % 2 == 0"), x=torch.zeros(2, 5, 4))
    for n in range(2, 30):
        adapted(torch.zeros(2, n, 4))
    (((_, graphs),),) = adapted.graphs._captured.values()
    assert len(graphs) == 2
    assert sorted(str(c) for graph in graphs for c in graph.conditions) == ["x.1 % 2 != 0", "x.1 % 2 = 0"]


def test_what_branches_everywhere_forgets_its_first_graphs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftfx.model.graphs.graph_cache._MOST", 4)
    adapted = adapted_on(Branching("n in tuple(range(2, 40))"), x=torch.zeros(2, 5, 4))
    for n in (2, 3, 4):
        adapted(torch.zeros(2, n, 4))
    with pytest.warns(UserWarning, match="another program for each"):
        adapted(torch.zeros(2, 6, 4))
    (((_, graphs),),) = adapted.graphs._captured.values()
    assert len(graphs) == 4


def test_a_graph_called_by_hand_refuses_the_other_side_of_a_branch() -> None:
    graph = capture(Branching("n > 8").eval(), {"x": torch.zeros(2, 5, 4)})
    with pytest.raises(PeftfxError, match=r"where x\.1 <= 8"):
        graph(x=torch.zeros(2, 9, 4))


@pytest.mark.parametrize("branch", [b for b in BRANCHES if b != "n > 3 and batch > 2"])
def test_an_export_that_is_right_for_some_sizes_alone_is_refused(branch: str, tmp_path: Path) -> None:
    model = Branching(branch).eval()
    with pytest.raises(PeftfxError, match=r"branches on a size.*right only where .*\[test_sizes|<string>"):
        export_onnx(model, tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("branch", ["batch == 1", "n == 1"])
def test_a_branch_on_a_size_of_one_is_named_for_a_large_model(
    branch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its graph is not run at such a size ahead of the export, which is compared there."""
    monkeypatch.setattr("peftfx.export.verification.cases._LARGE", 0)
    with pytest.raises(PeftfxError, match=r"branches on a size.*right only where"):
        export_onnx(Branching(branch).eval(), tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)})
    assert not (tmp_path / "out").exists()
    inputs = {"x": torch.zeros(2, 5, 4)}
    report = export_onnx(Branching(branch).eval(), tmp_path / "out", inputs=inputs, allow_fixed=True)
    assert "computes something else" in str(report)


class Faintly(nn.Module):
    """What is read of a table changes with the text's length, by less than usual tolerances."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(4, 4), part

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.part if x.shape[1] > 8 else y


def test_a_faint_difference_is_no_rounding(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 7, 4)}
    with pytest.raises(PeftfxError, match="branches on a size"):
        export_onnx(Faintly(2e-5), tmp_path / "out", inputs=inputs, view="forward")
    report = export_onnx(Faintly(0.0), tmp_path / "out", inputs=inputs, view="forward")
    assert report.sizes == []


class Exhausting(Branching):
    """It lacks the memory for a text of more than eight tokens, or for any."""

    def forward(self, x: Tensor) -> Tensor:
        if self.branch == "always" or (x.shape[1] > 8 and not torch.compiler.is_exporting()):
            torch.empty(1 << 58)
        return self.layer(x) * 3 if x.shape[1] > 8 else self.layer(x)


@pytest.mark.parametrize("branch", ["always", "where it is long"])
def test_a_lack_of_memory_is_never_taken_for_a_refusal_of_the_model(branch: str, tmp_path: Path) -> None:
    """Else the branch that could not be tried would count as one that no call reaches."""
    with pytest.raises(RuntimeError, match="allocate memory"):
        export_onnx(Exhausting(branch).eval(), tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)})
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_allowed_to_be_fixed_says_for_which_sizes_it_is_right(tmp_path: Path) -> None:
    model = Branching("n > 8").eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)}, allow_fixed=True)
    assert report.sizes == ["x.1 <= 8 (beyond, the model computes something else)"]
    assert ("sizes", f"right where {report.sizes[0]}") in report.rows()
    props = onnx.load(tmp_path / "out" / "model.onnx").metadata_props
    assert {p.key: p.value for p in props}["peftfx.sizes"] == report.sizes[0]
    tried = {shapes["x"][1] for shapes in report.probes}
    assert tried >= {5, 8}
    assert max(tried) == 8


class Tabled(nn.Module):
    """Ids of a text, embedded, and code that computes something else for texts of more than 8."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.config = transformers.PreTrainedConfig(max_position_embeddings=longest)
        self.layer = nn.Embedding(16, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.layer(input_ids)
        return y * 3 if input_ids.shape[1] > 8 else y


def test_what_a_model_computes_for_longer_texts_than_it_is_made_for_is_said_and_not_refused(tmp_path: Path) -> None:
    given = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    report = export_onnx(Tabled(8).eval(), tmp_path / "out", inputs=given)
    assert report.sizes == ["sequence <= 8 (the model is made for no more tokens)"]
    assert max(shapes["input_ids"][1] for shapes in report.probes) == 8
    with pytest.raises(PeftfxError, match=r"right only where sequence <= 8"):
        export_onnx(Tabled(9).eval(), tmp_path / "other", inputs=given)


class Short(nn.Module):
    """A table of 8 positions, and code that computes something else for texts of more than 12."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(16, 4)
        self.positions = nn.Parameter(torch.randn(8, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        y: Tensor = self.layer(input_ids) + torch.embedding(self.positions, torch.arange(length))
        return y if length <= 12 else y * 3


def test_a_bound_beyond_what_the_model_takes_is_not_verified(tmp_path: Path) -> None:
    given = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    report = export_onnx(Short().eval(), tmp_path / "out", inputs=given)
    assert report.sizes == ["sequence <= 12 (the model takes no other)"]
    assert max(shapes["input_ids"][1] for shapes in report.probes) <= 8


def test_a_branch_that_changes_nothing_is_no_limit_and_both_sides_are_verified(tmp_path: Path) -> None:
    class Chunked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 8:
                return torch.cat([super().forward(x[:, :8]), super().forward(x[:, 8:])], 1)
            return super().forward(x)

    report = export_onnx(Chunked(4, 4).eval(), tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)})
    assert report.sizes == []
    assert {5, 8, 9} <= {shapes["x"][1] for shapes in report.probes}


def test_bounds_of_the_models_own_are_said_and_not_refused(tmp_path: Path) -> None:
    inputs = {"x": torch.zeros(2, 5, 4), "mask": torch.ones(2, 5)}
    report = export_onnx(Joined().eval(), tmp_path / "out", inputs=inputs)
    assert "x.1 <= 16 (the model takes no other)" in report.sizes
    assert any("mask.1 = x.1" in line or "x.1 = mask.1" in line for line in report.sizes)
    assert 16 in {shapes["x"][1] for shapes in report.probes}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers_own_guards_are_not_refused(name: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    report = export_onnx(model, tmp_path / "out", view="auto")
    assert report.sizes == (["sequence <= 64 (the model takes no other)"] if name == "bert" else [])
    shapes = [shapes["input_ids"] for shapes in report.probes]
    assert [1, 1] in shapes
    assert ([2, 64] in shapes) == (name == "bert")


def test_of_a_large_model_the_smallest_call_is_tried_on_the_other_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trial, "MOST_WORK", 0)  # as little as is tried of any model
    assert export_onnx(ZOO["llama"].build(), tmp_path / "out", view="decode").sizes == []


@pytest.mark.parametrize("shape", [(9, 10), (18, 5)])
def test_ia3_on_a_convolution_of_a_reshaped_input_is_one_trace(shape: tuple[int, int]) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.reshape(-1, 5, 3, 3)).flatten(1))

    model = Reshaped().eval()
    rule = peftfx.IA3(target_modules=["conv"], feedforward_modules=["conv"], init_ia3_weights=False)
    adapted = peftfx.transform(model, rule, inputs={"x": torch.randn(*shape)})
    (scale,) = adapted.adapters.parameters()
    for x in (torch.randn(*shape), torch.randn(2 * shape[0], shape[1])):
        scaled = x.reshape(-1, 5, 3, 3) * scale
        torch.testing.assert_close(adapted(x), model.head(model.conv(scaled).flatten(1)), atol=1e-5, rtol=1e-5)


def test_an_output_with_nothing_among_its_tensors_is_held_against_the_models(tmp_path: Path) -> None:
    class Sparse(Branching):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            y = super().forward(x)
            return BaseModelOutput(last_hidden_state=y, hidden_states=(None, y + 1))  # type: ignore[arg-type]

    report = export_onnx(Sparse("n == 1 and False").eval(), tmp_path / "out", inputs={"x": torch.zeros(2, 5, 4)})
    assert report.outputs == ["last_hidden_state", "hidden_states.1"]


@pytest.mark.further
def test_a_branch_is_not_blamed_where_another_one_does_not_hold_either(tmp_path: Path) -> None:
    """Of 3 frames there is one pair, and one frame too many: an example with padding is right for all lengths."""
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 37}
    convs = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 3, "vocab_size": 13, "pad_token_id": 0}
    model = transformers.SEWForCTC(transformers.SEWConfig(**size, **convs, **places)).eval()
    report = peftfx.export_onnx(model, tmp_path / "out")
    assert not any("computes something else" in line for line in report.sizes)
    served = peftfx.runtime.load(tmp_path / "out")
    for samples in (30, 45, 64, 70, 81, 500):
        x = torch.randn(2, samples)
        with torch.no_grad():
            torch.testing.assert_close(served(input_values=x).logits, model(x).logits, atol=1e-5, rtol=0)
