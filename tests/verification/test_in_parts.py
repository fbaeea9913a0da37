"""A model that is run in parts gives the very bits of the whole, whatever its operators, types and slots."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor

import peftfx
from peftfx import PeftfxError
from peftfx.export.verification import graph_parts
from peftfx.export.verification import verify as verification
from peftfx.export.verification.comparison import VerificationError, reference_of
from peftfx.export.verification.graph_parts import ModelPart, Weight
from peftfx.export.verification.in_parts import InParts
from peftfx.export.verification.verify import verify
from peftfx.export.writing.weights import INLINE
from peftfx.model.api import bare
from peftfx.serving.adapter_file import read_adapter_file
from peftfx.serving.onnx_model import OnnxModel

FORWARD = ("bert", "gpt2", "vit", "unet", "t5", "custom")
DECODE = ("llama", "gpt2", "bloom", "mixtral")


def same(path: Path, calls: Sequence[dict[str, Tensor]], limit: int = 1, least: int = 0) -> list[ModelPart]:
    """Hold a model in parts to the whole: bit by bit, or in half precision to a few roundings. Return the parts."""
    model = OnnxModel(path, mapped=True)
    cut = InParts(model, limit, least)
    for call, got in zip(calls, cut(calls), strict=True):
        want = model(**call)
        assert list(got) == list(want)
        for name, value in want.items():
            assert got[name].dtype == value.dtype
            bound = 4 * torch.finfo(value.dtype).eps * value.abs().max() if value.dtype == torch.float16 else 0.0
            torch.testing.assert_close(got[name], value, rtol=0.0, atol=float(bound), msg=name)
    return cut.parts


def calls_of(path: Path, count: int = 3) -> list[dict[str, Tensor]]:
    """Calls of several sizes, from the model's own axes."""
    model, made = OnnxModel(path), []
    for number in range(count):
        random, sizes = torch.Generator().manual_seed(number), {"batch": number + 1, "past": 2 * number}
        sizes["sequence"] = 5 - number
        sizes["total"] = sizes["sequence"] + sizes["past"]
        call = {}
        for name in model.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in model.axes[name]]
            if model.types[name] == "tensor(int64)":
                ones = torch.ones(shape, dtype=torch.long)
                call[name] = ones if "mask" in name else torch.randint(2, 9, shape, generator=random)
            else:
                call[name] = torch.randn(shape, generator=random)
        made.append(call)
    return made


@pytest.mark.parametrize("name", but_for({"unet"}, [name for name in FORWARD if name in ZOO]))
def test_a_forward_view_in_parts_is_the_whole(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model = entry.build()
    example = entry.inputs(model=model)
    peftfx.export_onnx(model, tmp_path / "out", view="forward", inputs=example)
    names = OnnxModel(tmp_path / "out").inputs
    calls = [entry.inputs(batch, sequence, model=model) for batch, sequence in ((2, 7), (1, 5), (3, 9))]
    parts = same(tmp_path / "out", [{n: call[n] for n in names} for call in calls])
    assert len(parts) > 4


@pytest.mark.parametrize("name", [name for name in DECODE if name in ZOO])
def test_a_decode_view_in_parts_is_the_whole(name: str, tmp_path: Path) -> None:
    peftfx.export_onnx(ZOO[name].build(), tmp_path / "out", view="decode")
    parts = same(tmp_path / "out", calls_of(tmp_path / "out"))
    assert len(parts) > 4
    few = same(tmp_path / "out", calls_of(tmp_path / "out"), limit=1 << 14)
    assert 1 < len(few) < len(parts)
    assert len(same(tmp_path / "out", calls_of(tmp_path / "out"), limit=1 << 30)) == 1


@pytest.mark.parametrize("kind", ["int4", "int8", "fp16"])
def test_weights_of_other_types(kind: str, tmp_path: Path) -> None:
    base = ZOO["llama"].build()
    if kind == "fp16":
        peftfx.export_onnx(base.half(), tmp_path / "out", view="forward")
    else:
        peftfx.export_onnx(base, tmp_path / "out", view="forward", quantize=kind)
    ids = torch.randint(4, 99, (2, 6))
    same(tmp_path / "out", [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.further)], ids=str)
def test_values_that_are_put_into_slots_count(dtype: torch.dtype, tmp_path: Path) -> None:
    base = ZOO["llama"].build().to(dtype)
    peftfx.export_onnx(base, tmp_path / "out", view="forward", slots="attention")
    adapted = peftfx.transform(base, peftfx.LoRA(r=4, target="attention"))
    randomise(adapted.adapters)
    _, values = read_adapter_file(peftfx.export_adapter(adapted, tmp_path / "out", tmp_path / "adapter"))
    model, ids = OnnxModel(tmp_path / "out", mapped=True), torch.randint(4, 99, (2, 6))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    without = model(**call)["logits"]
    model.put(values)
    (got,) = InParts(model, limit=1, least=0)([call])
    bound = 0.0 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(got["logits"], model(**call)["logits"], rtol=0.0, atol=bound)
    assert float((got["logits"] - without).abs().max()) > 20 * bound


def test_loops_sequences_and_outputs_that_no_node_makes(tmp_path: Path) -> None:
    weights = {name: np.random.default_rng(i).standard_normal((4, 4)).astype("float32") for i, name in enumerate("uvw")}
    number = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "v"], ["product"]),  # v is outside of the loop, and so is x
            helper.make_node("Add", ["product", "x"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [number(name, kind, shape) for name, kind, shape in (("i", 7, []), ("go", 9, []), ("state", 1, None))],
        [number("go_on", 9, []), number("next", 1, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["three"], value=helper.make_tensor("three", 7, [], [3])),
        helper.make_node("Constant", [], ["told"], value=helper.make_tensor("told", 7, [1], [5])),
        helper.make_node("MatMul", ["x", "u"], ["first"]),
        helper.make_node("Loop", ["three", "", "first"], ["looped"], body=body),
        helper.make_node("SequenceConstruct", ["first", "looped"], ["both"]),
        helper.make_node("MatMul", ["looped", "w"], ["last"]),
        helper.make_node("TopK", ["last", "one"], ["top", "where"]),  # `where` is not used
        helper.make_node("ConcatFromSequence", ["both"], ["joined"], axis=0),
        helper.make_node("MatMul", ["joined", "u"], ["end"]),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [number("x", 1, ["rows", 4])],
        [number("end", 1, None), number("top", 1, None), number("told", 7, [1]), number("w", 1, [4, 4])],
        [*stored, numpy_helper.from_array(np.array([1]), "one")],
        value_info=[helper.make_tensor_sequence_value_info("both", 1, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=32)
    parts = same(tmp_path, [{"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)}])
    assert [weight.tensor.name for part in parts for weight in part.weights] == ["u", "v", "w", "one", "u"]


def test_rows_of_a_table_are_looked_up_in_the_file(tmp_path: Path) -> None:
    peftfx.export_onnx(ZOO["gpt2"].build(), tmp_path / "out", view="forward")  # its table is tied to its head
    model = OnnxModel(tmp_path / "out", mapped=True)
    parts = InParts(model, limit=1, least=0).parts
    lookups = [part for part in parts if any(node.op_type == "Gather" for node in part.nodes)]
    tables = {node.input[0] for part in lookups for node in part.nodes if node.op_type == "Gather"}
    assert not tables & {weight.tensor.name for part in lookups for weight in part.weights}


def test_a_refused_call_is_named_as_by_the_whole(tmp_path: Path) -> None:
    peftfx.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward")
    model, ids = OnnxModel(tmp_path / "out", mapped=True), torch.randint(4, 99, (2, 6))
    with pytest.raises(PeftfxError, match="batch is 2 in one input, and 3 in attention_mask"):
        InParts(model)([{"input_ids": ids, "attention_mask": torch.ones(3, 5).long()}])
    with pytest.raises(PeftfxError, match="also needs 'attention_mask'"):
        InParts(model)([{"input_ids": ids}])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_large_export_is_verified_in_parts(
    kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "MAPPED", 0)
    monkeypatch.setattr(verification, "InParts", functools.partial(InParts, limit=1, least=0))
    report = peftfx.export_onnx(ZOO["llama"].build().to(kind), tmp_path / "out", view="decode")
    assert re.search(r", in \d+ parts$", report.verified)
    assert "parts)" in str(report)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_weights_of_16_bits_are_cast_once_for_all_calls(
    kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = ZOO["llama"].build().to(kind), list[torch.Size]()

    def read(weight: Weight, *memory: Any) -> Tensor:
        value = read_wide(weight, *memory)
        seen.append(value.shape)
        return value

    read_wide = Weight.read_wide
    monkeypatch.setattr(Weight, "read_wide", read)
    monkeypatch.setattr(graph_parts, "WIDENED", 1 << 10)  # each weight in pieces
    monkeypatch.setattr(verification, "MAPPED", 0)
    monkeypatch.setattr(verification, "InParts", functools.partial(InParts, limit=1 << 13, least=0))
    report = peftfx.export_onnx(base, tmp_path / "out", view="decode")
    stored = [m.weight for m in base.modules() if isinstance(m, torch.nn.Linear) and m.weight.nbytes > INLINE]
    tables = [base.get_input_embeddings().weight.shape] if kind == torch.bfloat16 else []  # the twin casts it whole
    assert len(report.probes) > 2
    assert sorted(seen) == sorted([*(weight.shape[::-1] for weight in stored), *tables])


def test_a_wrong_byte_of_a_weight_is_found_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ZOO["llama"].build()
    peftfx.export_onnx(base, tmp_path / "out", view="forward")
    graph, cases = bare(base).graph(), [ZOO["llama"].inputs(3, 5, model=base)]
    monkeypatch.setattr(verification, "MAPPED", 0)
    monkeypatch.setattr(verification, "InParts", functools.partial(InParts, limit=1, least=0))
    verify(tmp_path / "out", reference_of(graph), cases)
    data = tmp_path / "out" / "model.onnx.data"
    written = np.fromfile(data, dtype="float32")
    written[len(written) // 2] += 1
    written.tofile(data)
    with pytest.raises(VerificationError, match="disagrees with the reference"):
        verify(tmp_path / "out", reference_of(graph), cases)


def test_a_data_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    peftfx.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward")
    model, ids = OnnxModel(tmp_path / "out", mapped=True), torch.randint(4, 99, (2, 6))
    data = tmp_path / "out" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(OSError, match="the file ends within"):
        InParts(model, limit=1, least=0)([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
