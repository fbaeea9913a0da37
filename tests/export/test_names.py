"""Names in an ONNX model: of modules, on nodes and values; what it came from, in its metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from support.zoo import Captured
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.export import OnnxModel, to_onnx
from peftfx.export.metadata import ADAPTERS_KEY, BASE_MODEL, FINGERPRINT, SCOPE
from peftfx.graph.fingerprint import SAMPLED, fingerprint
from peftfx.options import ENGINES
from peftfx.version import __version__


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_nodes_have_the_paths_of_modules(captured: Callable[[str], Captured], name: str, engine: str) -> None:
    found = captured(name)
    model = to_onnx(found.graph, engine=engine)
    modules = dict(found.model.named_modules())
    scopes = [node.metadata_props[SCOPE] for node in model.graph if SCOPE in node.metadata_props]
    assert len(scopes) > 0.7 * len(list(model.graph))
    assert set(scopes) <= modules.keys()
    products = {path for path, module in modules.items() if isinstance(module, nn.Linear)}
    assert products <= set(scopes)
    for node in model.graph:
        if path := node.metadata_props.get(SCOPE):
            assert str(node.name).startswith(f"{path}/"), "explorers group by names"
    attention = next(path for path in modules if path.endswith(("self_attn", "SelfAttention")))
    inside = {node.op_type for node in model.graph if node.metadata_props.get(SCOPE) == attention}
    assert inside & {"Softmax", "Attention"}, "what has no weight is of its own module, and not of a neighbour's"
    values = [str(value.name) for node in model.graph for value in node.outputs]
    assert sum(value.startswith(f"{attention}/") for value in values) > 3
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_a_model_says_what_it_came_from_and_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(2, 32)
    adapted = peftfx.transform(model, "lora(r=2)@all-linear", "mine", inputs={"input": x})
    for folder in ("a", "b"):
        adapted.export(tmp_path / folder)
    adapted.export(tmp_path / "small", quantize="int4")
    first, second = ((tmp_path / folder / "model.onnx").read_bytes() for folder in ("a", "b"))
    assert first == second
    loaded = onnx.load(tmp_path / "a" / "model.onnx", load_external_data=False)
    said = {prop.key: prop.value for prop in loaded.metadata_props}
    assert (loaded.producer_name, loaded.producer_version) == ("peftfx", __version__)
    assert (said[ADAPTERS_KEY], said[BASE_MODEL]) == ("mine: LoRA", "Sequential")
    assert said[FINGERPRINT] == fingerprint(model, SAMPLED)
    rounded = onnx.load(tmp_path / "small" / "model.onnx", load_external_data=False)
    scopes = {node.name: [p.value for p in node.metadata_props if p.key == SCOPE] for node in rounded.graph.node}
    products = [scopes[node.name] for node in rounded.graph.node if node.op_type == "MatMulNBits"]
    assert products
    assert all(len(own) == 1 for own in products)


class Numbered(nn.Module):
    """A model whose weights have the names that the translation gives to others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.w0, self.w1, self.w2 = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"made": self.layer(x * self.w2) * self.w1 + self.w0, "kind": "of text", "rows": 3}


def test_weights_may_have_the_names_of_a_translation_and_text_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Numbered().eval(), torch.randn(5, 4)
    with pytest.warns(PeftfxWarning, match=r"^kind: the model returns text here, which is left out"):
        peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 4)})
    got = OnnxModel(tmp_path / "out")(x=x)
    torch.testing.assert_close(got["made"], model(x)["made"])
    assert (got.keys(), got["rows"].item()) == ({"made", "rows"}, 3)
    assert set(model.state_dict()) <= {i.name for i in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
