"""Models whose images cannot be encoded by a graph: text alone is served, and a sentence says why."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from transformers import GenerationMixin

import peftfx
from peftfx import runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.deployment.parts import sites_view
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.finding.encoder_decoder_layers import find_layers

FURTHER = pytest.mark.further
ALONE = "are left out, and text alone is served"


def test_text_is_generated_and_the_images_are_said_to_be_left_out(tmp_path: Path) -> None:
    """The size of its pictures decides how many tiles they have."""
    model = build("image-text-to-text", "smolvlm")
    assert sites_view(model, "decode") == "decode"
    with pytest.warns(PeftfxWarning, match="images are left out.*no size is chosen"):
        peftfx.export_onnx(model, tmp_path / "out", view="decode")
    assert not (tmp_path / "out" / "vision_encoder.onnx").exists()
    text = {"input_ids": torch.tensor([[20, 21, 22, 23], [24, 25, 26, 27]])}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(runtime.load(tmp_path / "out").generate(**text, **options), model.generate(**text, **options))


@FURTHER
def test_images_that_a_soft_prompt_cannot_stand_before_are_named() -> None:
    """transformers' `generate` encodes them, and gives them under a name that no caller knows."""
    model = build("image-text-to-text", "idefics3")
    given = example_inputs(model)
    adapted = peftfx.transform(model, peftfx.PromptTuning(num_virtual_tokens=2))
    with pytest.raises(PeftfxError, match="reads text alone, and the call gives images"):
        adapted.generate(**given, max_new_tokens=2, do_sample=False)


def test_a_model_without_an_image_encoder_of_its_own_warns_too(tmp_path: Path) -> None:
    from peftfx.export.deployment.parts import views_of

    model = build("image-text-to-text", "git")
    with pytest.warns(PeftfxWarning, match="no image encoder that runs by itself"):
        assert views_of(model, "decode", None) == {"model.onnx": "decode"}


@pytest.mark.slow
def test_a_class_that_generates_without_positions_is_served_without_them(tmp_path: Path) -> None:
    """Its code counts from another number than zero, and leaves padding out by its token."""
    model = build("image-text-to-text", "kosmos-2.5")
    with pytest.warns(PeftfxWarning, match="images are left out.*takes no encoded images"):
        peftfx.export_onnx(model, tmp_path / "out", view="decode")
    served = runtime.load(tmp_path / "out")
    assert "position_ids" not in served.view.axes
    pad = model.config.text_config.pad_token_id
    text = {"input_ids": torch.tensor([[20, 21, 22, 23], [pad, pad, 26, 27]])}
    text["attention_mask"] = (text["input_ids"] != pad).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": pad}
    want = model.generate(**text, **options)
    assert torch.equal(served.generate(**text, **options), want)
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="all-linear"), seed=0, road="graph")
    assert torch.equal(adapted.generate(**text, **options), want)


def test_an_encoder_of_text_is_served_without_the_images_that_its_text_can_have() -> None:
    from peftfx.export.deployment.parts import views_of

    model = build("image-text-to-text", "florence2")
    own = {"_maybe_prepare_encoder_kwargs_for_generation": GenerationMixin._maybe_prepare_encoder_kwargs_for_generation}
    model.__class__ = type("Plain", (type(model),), own)
    with pytest.warns(PeftfxWarning, match="images are left out.*puts no encoded images into the text"):
        assert len(views_of(model, "decode", None)) == 2
    layers = find_layers(model)
    sizes = {"batch": 2, "encoder_sequence": 6, "sequence": 3, "past": 4}
    given = Decoder(layers).inputs(model, sizes=sizes)
    assert given["encoder_attention_mask"].shape == (2, 6)
    assert {value.shape[2] for name, value in given.items() if ".encoder." in name} == {6}
    assert Encoder(layers).inputs(model, sizes=sizes)["input_ids"].shape == (2, 6)


@pytest.mark.parametrize(
    ("task", "kind", "view", "told"),
    [
        ("text2text-generation", "voxtral", "forward", ""),
        pytest.param("text2text-generation", "voxtral", "decode", "", marks=FURTHER),
        (
            "text2text-generation",
            "musicflamingo",
            "forward",
            f"sounds {ALONE}: the model's sound encoder needs input_ids",
        ),
        pytest.param(
            "image-text-to-text", "kosmos-2.5", "forward", "images are left out, and text alone", marks=FURTHER
        ),
        pytest.param(
            "image-text-to-text", "qwen2_vl", "forward", "videos are left out, and text with images", marks=FURTHER
        ),
        pytest.param("speech-to-text", "whisper", "forward", "", marks=FURTHER),
        ("text-generation", "gemma3_text", "forward", ""),
    ],
)
def test_what_no_graph_takes_beside_a_text_is_said(task: str, kind: str, view: str, told: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PeftfxWarning)
        peftfx.export_onnx(build(task, kind), tmp_path / "out", view=view)
    found = [str(warning.message) for warning in said if "left out" in str(warning.message)]
    assert len(found) == bool(told)
    assert not told or found[0].startswith(told)
