"""Fuse: attentions over a cache, rotary embeddings and norms, one operator each, compute what their parts did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.export import export_onnx, to_onnx
from peftfx.export.translation.preparation import prepare
from peftfx.model.api import bare
from peftfx.passes import Cleanup, Fuse
from peftfx.passes.optimization.fuse import FUSED

pytestmark = pytest.mark.further

#: In two layers: attentions, rotary embeddings of queries and keys, and two norms a layer and a last one; those of
#: Qwen3 are also on queries and keys, and GPT-2, OPT and Phi have layer norms. GLM turns neighbours, not halves.
EXPECTED = {
    "gpt2": (2, 0, 0),
    "opt": (2, 0, 0),
    "llama": (2, 4, 5),
    "glm": (2, 0, 5),
    "gemma": (2, 4, 5),
    "phi": (2, 4, 0),
    "falcon": (2, 4, 0),
    "qwen3": (2, 4, 9),
    "bloom": (0, 0, 0),
}


@pytest.mark.parametrize("name", but_for({"opt", "gemma", "phi", "falcon", "qwen3"}, EXPECTED))
@torch.no_grad()
def test_a_decode_graph_computes_what_it_did(name: str) -> None:
    adapted = bare(ZOO[name].build().eval())
    view, graph = adapted.view("decode"), Cleanup()(adapted.graph(view="decode")).graph
    before = graph.text()
    result = Fuse()(graph)
    assert result.changed == sum(EXPECTED[name])
    assert graph.text() == before
    assert Fuse()(result.graph).changed == 0
    assert view is not None
    for sizes in view.trials:
        feed = view.inputs(adapted.base, sizes=sizes)
        flat = [feed[spec.name] for spec in graph.inputs]
        for output, want, got in zip(graph.outputs, graph.run(*flat), result.graph.run(*flat), strict=True):
            assert_same(view.shown(output, feed, got), view.shown(output, feed, want))


@pytest.mark.parametrize("name", but_for({"gpt2", "falcon", "qwen3"}, ("llama", "gpt2", "falcon", "qwen3")))
def test_heads_stay_side_by_side_from_projection_to_projection(name: str) -> None:
    made = Counter(node.op_type for node in to_onnx(bare(ZOO[name].build().eval()).graph(view="decode")).graph)
    assert made["Attention"] == 2
    assert not made["Transpose"] + made["GatherND"]


class Gathers(nn.Module):
    """Reads a mask as transformers does, by rows and columns: in their order, or columns first."""

    def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[None, None, :]
        return mask[rows, columns], mask[columns, rows]


def test_a_gather_in_the_order_of_what_it_reads_becomes_slices() -> None:
    axes = {"mask": ("rows", "all"), "x": ("rows", "some")}
    graph = peftfx.capture(Gathers().eval(), {"mask": torch.ones(3, 7), "x": torch.ones(3, 5)}, axes=axes)
    ready = prepare(graph)
    assert [node.target for node in ready.nodes()].count(torch.ops.aten.index.Tensor) == 1
    for rows, columns, some in ((2, 9, 4), (1, 1, 1), (4, 4, 4)):
        given = torch.randn(rows, columns), torch.randn(rows, min(some, rows, columns))
        for want, got in zip(graph.run(*given), ready.run(*given), strict=True):
            assert torch.equal(want, got)


class Parts(nn.Module):
    """Reads parts of an axis by lists of numbers: some that follow each other, and some that do not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[:, [-2]], x[:, [2, 3]], x[:, [-1, 0]], x[:, [-1, 5, 4]], x[[0, 1]]


def test_a_gather_of_a_run_of_numbers_becomes_a_slice() -> None:
    graph = peftfx.capture(Parts().eval(), {"x": torch.ones(3, 6, 2)}, axes={"x": ("batch", None, None)})
    ready = prepare(graph)
    assert [node.target for node in ready.nodes()].count(torch.ops.aten.index.Tensor) == 3
    for batch in (2, 5):
        given = torch.randn(batch, 6, 2)
        for want, got in zip(graph.run(given), ready.run(given), strict=True):
            assert torch.equal(want, got)


class Writes(nn.Module):
    """Writes into what it gathered, and reads the mask after that."""

    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(size) for size in mask.shape)
        gathered = mask[rows[:, None], columns[None, :]]
        gathered += 1
        return gathered, mask * 2


def test_a_gather_that_is_written_to_stays_a_copy() -> None:
    graph = peftfx.capture(Writes().eval(), {"mask": torch.ones(3, 7)})
    given = torch.randn(2, 5)
    for want, got in zip(graph.run(given), prepare(graph).run(given), strict=True):
        assert torch.equal(want, got)
    assert torch.equal(graph.run(given)[1], given * 2)


def assert_same(got: Tensor, want: Tensor) -> None:
    if want.numel():
        assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_an_export_has_them_and_agrees_with_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ZOO["llama"].build().to(dtype)
    report = export_onnx(model, tmp_path / "cpu", view="decode")
    assert report.fused == dict(zip(FUSED, EXPECTED["llama"], strict=True))
    assert report.opset == 23
    assert "2 Attention" in str(report)
    plain = export_onnx(model, tmp_path / "none", view="decode", optimize="none")
    assert plain.fused == {}
    assert plain.opset < 23
    assert count(tmp_path / "none")["Softmax"] == 2
    assert count(tmp_path / "cpu")["Softmax"] == 0


def test_operators_that_a_version_does_not_have_are_not_used(tmp_path: Path) -> None:
    report = export_onnx(ZOO["llama"].build(), tmp_path / "out", view="decode", opset=21)
    assert (report.opset, report.fused) == (21, {})


def test_an_adapter_apart_and_a_prefix_inside_are_no_obstacle(tmp_path: Path) -> None:
    rules = [peftfx.LoRA(r=2, target="attention"), peftfx.PrefixTuning(num_virtual_tokens=3)]
    adapted = peftfx.transform(ZOO["llama"].build(), rules, seed=0)
    stir(adapted.adapters)
    report = adapted.export(tmp_path / "out", view="decode", merge=False)
    assert report.fused["Attention"] == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", but_for({"gpt2"}, ["llama", "gpt2"]))
def test_a_cache_after_a_prefix_is_made_of_the_past_and_not_cut_from_both(name: str, tmp_path: Path) -> None:
    adapted = peftfx.transform(ZOO[name].build(), peftfx.PrefixTuning(num_virtual_tokens=3), seed=0)
    stir(adapted.adapters)
    adapted.export(tmp_path / "out", view="decode")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    presents = [value.name for value in graph.output if value.name.startswith("present")]
    for present in presents:
        assert makers[present].op_type == "Concat"
        assert makers[present].input[0] == present.replace("present", "past_key_values")
    assert len(presents) == 4


def test_a_prefix_that_no_cache_holds_is_served_too(tmp_path: Path) -> None:
    adapted = peftfx.transform(ZOO["llama"].build(), peftfx.PrefixTuning(num_virtual_tokens=3), seed=0)
    stir(adapted.adapters)
    report = adapted.export(tmp_path / "out", view="forward")
    assert report.comparisons  # type: ignore[attr-defined]


def stir(adapters: nn.Module) -> None:
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_(std=0.3)


def test_only_what_has_a_name_is_optimized_for() -> None:
    with pytest.raises(PeftfxError, match="unknown optimize target 'tpu'"):
        export_onnx(ZOO["llama"].build(), "nowhere", optimize="tpu")


def test_cuda_has_the_operators_that_the_cpu_has() -> None:
    graph = bare(ZOO["llama"].build().eval()).graph(view="decode")
    cpu, cuda = (to_onnx(graph, optimize=provider) for provider in ("cpu", "cuda"))
    assert [node.op_type for node in cpu.graph] == [node.op_type for node in cuda.graph]
    assert cuda.opset_imports[""] == 23  # of later versions, CUDA has not all kernels


def count(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(directory / "model.onnx").graph)
