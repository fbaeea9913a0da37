"""Models that write sounds into their text: examples, and forward graphs with other sounds than the example's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from every_model.checks import build
from sounds.hearing import KINDS, MODELS, SOUND, adapted_by_peft, exported_once, loaded, voxtral
from support.few import but_further
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.export import OnnxModel
from peftfx.views.finding.sound_views import find_sounds, why_not_heard

Inputs = dict[str, Tensor]


def call(base: nn.Module, texts: int, sounds: int, length: int = 11) -> Inputs:
    return example_inputs(base, sizes={"batch": texts, "sequence": length, "sounds": sounds}, seed=sounds)


def hold(want: nn.Module, served: OnnxModel, inputs: Inputs) -> None:
    with torch.no_grad():
        expected = want(**inputs).logits
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(served(**inputs)["logits"][shown], expected[shown], atol=3e-5, rtol=3e-4)


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """`export_of(kind)`: the model that `peft` adapted, and the directory of its forward graph, which is made once."""
    return exported_once("forward", tmp_path_factory)


@pytest.fixture(params=KINDS)
def exported(
    request: pytest.FixtureRequest, export_of: Callable[[str], tuple[nn.Module, Path]]
) -> tuple[nn.Module, Path]:
    return export_of(request.param)


def test_a_graph_takes_any_number_of_sounds(exported: tuple[nn.Module, Path]) -> None:
    want, directory = exported
    served = OnnxModel(directory)
    assert next(served.axes[name] for name in served.inputs if name in RECORDINGS)[0] == "sounds"
    for texts, sounds in ((1, 1), (3, 3), (1, 2), (3, 2), (2, 5)):
        hold(want, served, call(want.get_base_model(), texts, sounds))


def test_a_text_with_another_number_of_tokens_is_refused(exported: tuple[nn.Module, Path]) -> None:
    want, directory = exported
    inputs = call(want.get_base_model(), 2, 2)
    first = (inputs["input_ids"] == SOUND).nonzero()[0]
    inputs["input_ids"][tuple(first)] = 5
    with pytest.raises(PeftfxError, match="tokens of images or sounds"):
        OnnxModel(directory)(**inputs)


@pytest.mark.further
def test_masks_say_how_long_sounds_are(export_of: Callable[[str], tuple[nn.Module, Path]]) -> None:
    want, directory = export_of("flamingo")
    inputs = call(want.get_base_model(), 2, 2)
    inputs["input_features_mask"][1, 20:] = 0  # 5 of 8 tokens are left
    ids = inputs["input_ids"]
    places = (ids[1] == SOUND).nonzero().flatten()
    ids[1, places[5:]] = torch.arange(20, 20 + len(places) - 5)
    hold(want, OnnxModel(directory), inputs)


@pytest.mark.parametrize("kind", but_further({*MODELS} - {"voxtral"}, MODELS))
def test_a_model_in_half_precision_hears_too(kind: str, tmp_path: Path) -> None:
    """Its layers take no float32 recording, not even one of an example."""
    want = adapted_by_peft(kind, tmp_path / "adapter").half()
    torch.manual_seed(0)
    ours = peftfx.load(MODELS[kind]().half(), tmp_path / "adapter")
    inputs = call(want.get_base_model(), 2, 3)
    assert next(inputs[name] for name in RECORDINGS if name in inputs).dtype == torch.float16
    with torch.no_grad():
        got, expected = ours(**inputs).logits, want(**inputs).logits
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert find_sounds(ours.get_base_model()).heard == torch.float16


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("musicflamingo", r"sound encoder needs input_ids too"),
        ("qwen3_asr", r"branches on a mask's values, at modeling_qwen3_asr\.py:\d+ \(`.*cnn_len"),
    ],
)
def test_a_sound_encoder_that_no_graph_can_have_is_told_by_its_cause(kind: str, why: str) -> None:
    assert re.search(why, why_not_heard(build("text2text-generation", kind)))


def test_labels_are_masked_at_the_tokens_of_sounds() -> None:
    made = example_inputs(voxtral(), labels=True)
    assert bool((made["labels"][made["input_ids"] == SOUND] == -100).all())
    assert bool((made["labels"] != -100).any())


@pytest.mark.further
def test_each_text_has_a_sound_where_adapters_act_in_its_encoder_by_row(tmp_path: Path) -> None:
    wants = {name: adapted_by_peft("voxtral", tmp_path / name, alpha) for name, alpha in (("a", 8), ("b", 3))}
    model = loaded("voxtral", tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    model.export(tmp_path / "onnx", view="forward", batched=["default", "b"])
    inputs = call(model.get_base_model(), 2, 2)
    served = OnnxModel(tmp_path / "onnx")(**inputs, adapter_ids=torch.tensor([0, 1]))["logits"]
    for row, name in enumerate(("a", "b")):
        with torch.no_grad():
            expected = wants[name](**inputs).logits[row]
        shown = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(served[row][shown], expected[shown], atol=3e-5, rtol=3e-4)


class Learned(nn.Module):
    """Attention of learned queries, which are those of all rows, with heads or without."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(1, *([heads] if heads else []), 3, 8))
        self.layer, self.heads = nn.Linear(8, 8), heads

    def forward(self, x: Tensor) -> Tensor:
        keys = self.layer(x)
        if self.heads:
            keys = keys.unsqueeze(1) * torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
        return F.scaled_dot_product_attention(self.queries, keys, keys * 2)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_learned_queries_are_those_of_all_rows(heads: int, tmp_path: Path) -> None:
    model = Learned(heads).eval()
    peftfx.export_onnx(model, tmp_path / "onnx", inputs={"x": torch.randn(4, 5, 8)})
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(next(iter(OnnxModel(tmp_path / "onnx")(x=x).values())), model(x), atol=1e-5, rtol=1e-5)
