"""The file of weights of another export beside a graph: it was read without a message."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor
from support.adapted import adapt
from support.zoo import ZOO

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export.metadata import PERM, SOURCE
from peftfx.export.writing.digest import Digest
from peftfx.export.writing.weights import save_together
from peftfx.serving.onnx_model import OnnxModel

DATA = "model.onnx.data"


def export(directory: Path, name: str, seed: int) -> Path:
    """An export with one trained row of a table: all else is the same for each seed."""
    adapted = adapt(name, peftfx.TrainableTokens(token_indices=[7]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapted.export(directory, view="forward" if name == "llama" else "decode")
    return directory


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.further)])
def test_weights_of_another_export_are_refused(name: str, tmp_path: Path) -> None:
    one, other = (export(tmp_path / str(seed), name, seed) for seed in (1, 2))
    assert (one / DATA).stat().st_size == (other / DATA).stat().st_size
    graphs = list(one.glob("*.onnx"))
    assert all(OnnxModel(graph).inputs for graph in graphs)
    shutil.copy(other / DATA, one / DATA)
    for graph in graphs:
        with pytest.raises(PeftfxError, match=f"{DATA} has the weights of another export") as error:
            OnnxModel(graph)
        assert "copy the graph and its weights from one export" in error.value.hint
    weights = (one / DATA).read_bytes()
    for left, what in ((len(weights) - 1, "the weights of another export"), (1000, "cannot open the model")):
        (one / DATA).write_bytes(weights[:left])
        with pytest.raises(PeftfxError, match=what) as error:
            OnnxModel(graphs[0])
    assert error.value.hint.startswith("a file of weights beside the graph is missing or cut")
    (one / DATA).unlink()
    with pytest.raises(PeftfxError, match="cannot open the model") as error:
        OnnxModel(graphs[0])
    assert error.value.hint.startswith("a file of weights beside the graph is missing or cut")
    graphs[0].write_bytes(graphs[0].read_bytes()[:5000])
    with pytest.raises(PeftfxError, match="cannot open the model") as error:
        OnnxModel(graphs[0])
    assert error.value.hint.startswith("the file is cut or damaged")


@pytest.mark.further
def test_the_same_weights_and_those_that_another_tool_wrote_are_read(tmp_path: Path) -> None:
    """A tool keeps the metadata, and writes no digest."""
    made, again = (export(tmp_path / name, "llama", 1) for name in ("made", "again"))
    assert (made / DATA).read_bytes() == (again / DATA).read_bytes()
    shutil.copy(again / DATA, made / DATA)
    graph = onnx.load(made / "model.onnx")
    (tmp_path / "anew").mkdir()
    onnx.save(graph, tmp_path / "anew" / "model.onnx", save_as_external_data=True, location=DATA)
    assert OnnxModel(tmp_path / "anew").metadata == OnnxModel(made).metadata
    given = {name: tensor for name, tensor in ZOO["llama"].inputs(2, 5).items() if name in OnnxModel(made).inputs}
    want, got = (OnnxModel(path)(**given)["logits"] for path in (made, tmp_path / "anew"))
    assert torch.equal(got, want)
    onnx.save(onnx.load(made / "model.onnx"), export(tmp_path / "other", "llama", 2) / "inline.onnx")
    assert torch.equal(OnnxModel(tmp_path / "other" / "inline.onnx")(**given)["logits"], want)


def test_a_digest_tells_every_byte_and_its_place() -> None:
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (3 << 20) + 4096 + 13, dtype=np.uint8)

    def digest(*parts: np.ndarray) -> str:
        found = Digest()
        for part in parts:
            found.update(memoryview(part))
        return found.hexdigest()

    want, seen = digest(data), set()
    assert digest(data.copy()) == want
    for place in (0, 1 << 20, len(data) - 4096 - 14, len(data) - 1, *random.integers(0, len(data), 5)):
        changed = data.copy()
        changed[place] += 1
        seen.add(digest(changed))
    rows = data.copy()
    rows[:8192] = np.roll(rows[:8192], 4096)
    columns = data.copy()
    columns[:4096] = np.roll(columns[:4096], 8)
    assert len(seen | {digest(rows), digest(columns), want}) == 12


def initializer(name: str, tensor: torch.Tensor, perm: str | None) -> ir.Value:
    held = TorchTensor(tensor, name=name)
    value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
    value.meta[SOURCE] = "base.weight"
    if perm is not None:
        value.metadata_props[PERM] = perm
    return value


def test_a_weight_is_there_once_for_each_layout_dtype_and_shape(tmp_path: Path) -> None:
    weight = torch.randn(40, 40)
    stored = [
        (weight, None),
        (weight, None),
        (weight.T.contiguous(), "1 0"),
        (weight.half(), None),
        (weight[16:], None),
    ]
    models = {}
    for i, (tensor, perm) in enumerate(stored):
        value = initializer(f"w{i}", tensor, perm)
        models[f"{i}.onnx"] = ir.Model(
            ir.Graph([], [value], nodes=[], initializers=[value], opset_imports={"": 18}, name="g"), ir_version=10
        )
    save_together(models, tmp_path)
    for name, (tensor, _) in zip(models, stored, strict=True):
        (read,) = onnx.load(tmp_path / name).graph.initializer
        assert np.array_equal(onnx.numpy_helper.to_array(read), tensor.numpy())
    assert (tmp_path / DATA).stat().st_size < sum(tensor.nbytes for tensor, _ in stored[1:]) + 200, (
        "the first two are one"
    )
