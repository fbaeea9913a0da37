"""Examples of pictures, as a model's own processor makes them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel


def test_numbers_that_do_not_depend_on_pixels_are_kept() -> None:
    """A patch starts with its row and its column; the mask of patches is of floats."""
    made = example_inputs(build("image-text-to-text", "pix2struct"), sizes={"batch": 3})
    rows, columns = (torch.arange(1, 5).float() for _ in range(2))
    torch.testing.assert_close(made["flattened_patches"][1, :, :2], torch.cartesian_prod(rows, columns))
    assert (made["flattened_patches"][0, :, 2:] != made["flattened_patches"][1, :, 2:]).all()
    assert made["attention_mask"].eq(1).all()


def test_a_processor_may_take_arrays_alone() -> None:
    made = example_inputs(build("image-text-to-text", "emu3"))
    assert made["pixel_values"].shape == (2, 3, 32, 32)
    assert made["image_sizes"].tolist() == [[32, 32]] * 2


def test_a_class_that_reads_texts_alone_gets_no_picture() -> None:
    """It would hand a picture on to a model that reads them."""
    assert set(example_inputs(build("text-classification", "qwen3_5"))) == {"input_ids", "attention_mask"}


def test_a_special_token_outside_the_vocabulary_is_in_no_text() -> None:
    """SigLIP's config names the end of CLIP's texts, 49407, and has 32,000 tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 90, "pad_token_id": 90, "eos_token_id": 49407}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
    made = example_inputs(model)
    assert (made["input_ids"] < 90).all()
    assert model(**made).logits_per_text.isfinite().all()


@pytest.mark.further
@pytest.mark.parametrize("kind", ["modernvbert", "neomme"])
def test_an_encoder_that_the_forward_calls_runs_for_all_pictures(kind: str, tmp_path: Path) -> None:
    """The forward of such a model takes no encoded pictures."""
    model = peftfx.transform(build("fill-mask", kind), peftfx.LoRA(r=2, target="all-linear")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.export(tmp_path / "out")
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 5), (3, 11)):
        inputs = example_inputs(model.base, sizes={"batch": batch, "sequence": length}, seed=batch)
        with torch.no_grad():
            want = model(**inputs).logits
        got = served(**{name: inputs[name] for name in served.inputs})["logits"]
        shown = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[shown], want[shown], atol=2e-5, rtol=2e-4)


def test_patches_are_made_where_the_encoder_reads_these() -> None:
    made = example_inputs(build("text-generation", "fuyu"), sizes={"batch": 3, "sequence": 5})
    assert made["pixel_values"].shape == (3, 16, 3 * 8 * 8)
    assert made["input_ids"].shape == (3, 16 + 5)


def test_masks_say_which_tokens_are_an_image_or_see_one() -> None:
    places = example_inputs(build("image-text-to-text", "kosmos-2"), sizes={"sequence": 5})
    assert places["image_embeds_position_mask"].sum(1).tolist() == [64, 64]  # one for each latent query
    seen = example_inputs(build("image-text-to-text", "idefics"))
    assert seen["pixel_values"].shape == (2, 1, 3, 32, 32)
    assert seen["image_attention_mask"][:, :, 0].tolist() == [[0, 1, 1, 1, 1, 1, 1]] * 2


def test_boxes_lie_on_a_page() -> None:
    made = example_inputs(build("text-classification", "layoutlm"))
    left, top, right, bottom = made["bbox"].unbind(-1)
    assert made["bbox"].shape == (*made["input_ids"].shape, 4)
    assert ((left <= right) & (top <= bottom)).all()
    assert made["bbox"].min() >= 0
    assert made["bbox"].max() < 1000


def test_a_model_made_from_a_config_alone_is_told_where_its_processor_belongs() -> None:
    base = build("image-text-to-text", "qwen2_vl")
    home, base.config.name_or_path = base.config.name_or_path, ""
    rule = peftfx.LoRA(r=2, target="all-linear")
    with pytest.raises(PeftfxError, match="name_or_path to a folder"):
        peftfx.transform(base, rule)
    base.config.name_or_path = home
    assert any("visual" in site.path for site in peftfx.transform(base, rule).sites)


def test_an_argument_that_the_call_lacks_is_told() -> None:
    base = build("image-text-to-text", "pix2struct")
    base.config.name_or_path = ""
    with pytest.raises(PeftfxError, match="You have to specify flattened_patches") as caught:
        peftfx.transform(base, peftfx.LoRA(r=2, target="all-linear"))
    assert caught.value.hint.startswith("this call has no flattened_patches: in Python, pass inputs=")


@pytest.mark.further
@pytest.mark.parametrize("kind", ["minicpmv4_6", "minicpmv4_7"])
def test_pictures_may_stand_side_by_side(kind: str, tmp_path: Path) -> None:
    """A processor joins the patches of all pictures along the last axis. How many there are, other arguments tell."""
    want = peft.get_peft_model(build("image-text-to-text", kind), peft.LoraConfig(r=4, target_modules="all-linear"))
    randomise(want.eval())
    want.save_pretrained(tmp_path / "adapter")
    model = peftfx.load(build("image-text-to-text", kind), tmp_path / "adapter")
    sizes = {"batch": 1, "sequence": 8, "images": 2}
    inputs = example_inputs(model.base, sizes=sizes)
    assert inputs["pixel_values"].shape == (1, 3, 8, 1024)
    assert inputs["target_sizes"].tolist() == [[8, 8]] * 2
    model.export(tmp_path / "out", view="decode", image_size=(64, 64))
    served = peftfx.runtime.load(tmp_path / "out")
    steps = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for images in (2, 1):
        given = example_inputs(model.base, sizes={**sizes, "images": images}, seed=images)
        assert torch.equal(served.generate(**given, **steps), want.generate(**given, **steps))
    wide = torch.randn(1, 3, 8, 1024)  # one picture that is too wide
    with pytest.raises(PeftfxError, match="resize the images to the size of the export"):
        served.generate(**{**given, "pixel_values": wide}, **steps)


def test_a_picture_has_as_many_pieces_as_a_detector_has_queries() -> None:
    """Its code takes the best pieces, one for each query, and raises where there are fewer."""
    model = build("object-detection", "rt_detr")
    assert example_inputs(model)["pixel_values"].shape[-2:] == (64, 64)
    model.config.num_queries = 300
    pictures = example_inputs(model)
    assert pictures["pixel_values"].shape[-2:] == (192, 192)
    assert model(**pictures).logits.shape[1] == 300
