"""The forward of models of text and images whose code takes images one after the other: any number, of one size."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from every_model.checks import build
from packaging.version import Version
from support.few import but_for
from torch import Tensor

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.token_types import MODALITIES
from peftfx.export import OnnxModel
from peftfx.model.adapted import AdaptedModel
from peftfx.views.finding.image_positions import find_image_positions
from peftfx.views.finding.image_views import find_images

TASK = "image-text-to-text"


def adapted(kind: str, *, head: bool = True) -> AdaptedModel:
    model = build(TASK, kind)
    made = peftfx.transform(model if head else model.base_model, peftfx.LoRA(r=2, target="all-linear"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def hold(model: AdaptedModel, served: OnnxModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        (name, want), *_ = model(**inputs).items()
    got = served(**{name: value for name, value in inputs.items() if name in served.inputs})[name]
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[shown], want[shown], atol=2e-5, rtol=2e-4)


def hold_other_numbers(model: AdaptedModel, served: OnnxModel) -> None:
    for batch, length in ((1, 5), (3, 11)):
        hold(model, served, example_inputs(model.base, sizes={"batch": batch, "sequence": length}, seed=batch))
    two = example_inputs(model.base, sizes={"batch": 2, "sequence": 6}, seed=7)
    two["attention_mask"][:] = 1
    hold(model, served, joined(two))


def joined(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One text of both texts of a call, with both images."""
    return {
        name: value.reshape(1, -1) if value.shape[:2] == inputs["input_ids"].shape else value
        for name, value in inputs.items()
    }


@pytest.mark.further
@pytest.mark.parametrize("kind", but_for({"llava"}, ("llava", "smolvlm")))
def test_texts_and_images_of_other_numbers(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    report = model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    hold_other_numbers(model, served)
    told = [line for line in report.sizes if "a part of an image is empty" in line]
    assert bool(told) is (kind == "smolvlm")
    if told:  # an empty tile, which the code would leave out
        inputs = example_inputs(model.base, sizes={"batch": 2, "sequence": 6})
        inputs["pixel_values"][1, 2] = 0
        got = served(**inputs)["logits"]
        assert got[1].isnan().any()
        assert not got[0].isnan().any()


@pytest.mark.further
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_model_without_a_head_gives_hidden_states(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, head=False)
    model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    assert list(served.outputs) == ["last_hidden_state"]
    hold_other_numbers(model, served)
    with pytest.raises(PeftfxError, match="gives no logits: its class has no head that writes text"):
        model.export(tmp_path / "decode", view="decode")


@pytest.mark.further
def test_other_values_of_an_images_sizes_are_told_and_refused(tmp_path: Path) -> None:
    model = adapted("qwen2_vl")
    report = model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    hold_other_numbers(model, served)
    line = "image_grid_thw [[1, 8, 8]] for each image"
    assert line in report.sizes
    inputs = example_inputs(model.base, sizes={"batch": 2, "sequence": 6})
    other = {**inputs, "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 16]])}
    with pytest.raises(PeftfxError, match="ONNX Runtime refuses") as refused:
        served(**other)
    assert line in refused.value.hint


@pytest.mark.slow
def test_a_chosen_size_is_that_of_all_images(tmp_path: Path) -> None:
    model = adapted("qwen2_5_vl")
    report = model.export(tmp_path / "out", view="forward", image_size=(48, 64))
    assert "image_grid_thw [[1, 6, 8]] for each image" in report.sizes
    with pictures_of((48, 64)):
        inputs = example_inputs(model.base, sizes={"batch": 3, "sequence": 4}, seed=1)
    hold(model, OnnxModel(tmp_path / "out"), inputs)


def test_inputs_and_a_size_are_not_both_taken(tmp_path: Path) -> None:
    model = adapted("qwen2_vl")
    with pytest.raises(PeftfxError, match="both given"):
        peftfx.export_onnx(model, tmp_path / "out", view="forward", image_size=(48, 64), inputs=model.example)


@pytest.mark.further
def test_positions_are_an_input_where_types_do_not_tell_them(tmp_path: Path) -> None:
    model = adapted("hunyuan_vl")
    model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    assert "position_ids" in served.inputs
    inputs = example_inputs(model.base, sizes={"batch": 3, "sequence": 5}, seed=2)
    inputs["position_ids"] = model.base._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    hold(model, served, inputs)


@pytest.mark.parametrize(("kind", "found"), [("qwen2_vl", True), ("glm4v", True), ("hunyuan_vl", False)])
def test_positions_are_found_where_they_follow_from_types(kind: str, found: bool) -> None:
    base = build(TASK, kind)
    made = example_inputs(base, sizes={"batch": 1})
    images = find_images(base, of_any_size=True)
    pieces = int((made["input_ids"] == images.token).sum())
    positions = find_image_positions(base, made, images.token, pieces)
    assert (positions is not None) is found
    if positions is not None:
        two = example_inputs(base, sizes={"batch": 3, "sequence": 6}, seed=3)
        want = base._prepare_position_ids_for_generation(two["input_ids"], dict(two))  # type: ignore[operator]
        shown = two["attention_mask"].bool()
        assert torch.equal(positions.of(two[MODALITIES], two["attention_mask"])[:, shown], want[:, shown])


@pytest.mark.further
@pytest.mark.skipif(Version(hf.__version__) >= Version("5.25"), reason="Molmo2's images are apart since then")
def test_images_that_depend_on_each_other_are_not_encoded_apart(tmp_path: Path) -> None:
    model = peftfx.transform(build(TASK, "molmo2"), peftfx.LoRA(r=2, target="all-linear"))
    with pytest.raises(PeftfxError):
        model.export(tmp_path / "out", view="forward")


def test_a_model_whose_forward_cannot_be_captured_is_merged() -> None:
    """Its code reads the values of an image's arguments: graphs are of a call in which these are constants."""
    model = adapted("qwen2_vl")
    inputs = example_inputs(model.base, sizes={"batch": 3, "sequence": 4}, seed=1)
    with torch.no_grad():
        want = model(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, want, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        model = copy.deepcopy(model)
        model.merge()
        model.add_adapter("more", peftfx.LoRA(r=2, target="attention.value"))  # it starts as the identity
        torch.testing.assert_close(model(**inputs).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.further
def test_images_that_stand_side_by_side_are_left_to_the_decode_view(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="stand side by side in a tensor") as caught:
        adapted("minicpmv4_6").export(tmp_path / "out", view="forward")
    assert "export the decode view" in str(caught.value)
    assert not list(tmp_path.iterdir())
