"""Prompts with images whose size decides how many pieces they have: grids, tiles, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from every_model.pictures import home_of
from PIL import Image
from support.adapted import randomise
from support.command import Result, assert_refused
from support.few import but_for
from support.words import picture, word_tokenizer

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of

pytestmark = pytest.mark.further

Run = Callable[..., Result]
TASK = "image-text-to-text"
WORDS = {"<|image_pad|>": 98, "<|video_pad|>": 97, "<unk>": 0, "<pad>": 1, "<eos>": 3}


def processor() -> hf.Qwen2VLProcessor:
    table = WORDS | {f"w{i}": i for i in range(5, 90)}
    special = [word for word in WORDS if word != "<unk>"]
    words = word_tokenizer(table, special, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    pictures = hf.AutoImageProcessor.from_pretrained(home_of("qwen2_vl"))
    return hf.Qwen2VLProcessor(image_processor=pictures, tokenizer=words, video_processor=hf.Qwen2VLVideoProcessor())


def test_a_chosen_size_fixes_the_grid_of_an_images_patches(peftfx: Run, tmp_path: Path) -> None:
    base = build(TASK, "qwen2_vl")
    base.save_pretrained(tmp_path / "base")
    made = processor()
    made.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "qkv", "fc1"])).eval()
    randomise(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    where = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    told = peftfx("export", *where, "--view", "decode", "--image-size", "48x64")
    assert told.code == 0, told.err
    for width, height in ((64, 48), (90, 30)):  # the second is resized
        path = picture(tmp_path / "a.png", width, (width, height))
        said = peftfx("run", tmp_path / "out", "--image", path, "--prompt", "w5 w6 w7", "--max-new-tokens", 8)
        assert said.code == 0, said.err
        resized = Image.open(path).convert("RGB").resize((64, 48))
        inputs = made(text="<|image_pad|>w5 w6 w7", images=[resized], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        words = made.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.out.strip() == words
    served = runtime.load(tmp_path / "out")
    inputs = made(text="<|image_pad|>w5", images=[Image.new("RGB", (48, 64))], return_tensors="pt")
    with pytest.raises(PeftfxError, match=r"made for images with image_grid_thw \[\[1, 6, 8\]\]"):
        served.generate(**inputs, max_new_tokens=2)
    small = made(text="<|image_pad|>w5", images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    with pytest.raises(PeftfxError, match=r"takes \[48, 384\] for an image, from images of 48 x 64"):
        served.generate(**small, max_new_tokens=2)


@pytest.mark.parametrize("kind", but_for({"smolvlm"}, ["smolvlm", "llava_next"]))
def test_tiles_are_served_and_an_empty_tile_is_refused(kind: str, tmp_path: Path) -> None:
    model = build(TASK, kind)
    compiler.export_onnx(model, tmp_path / "out", view="decode", image_size=(64, 64))
    served = runtime.load(tmp_path / "out")
    with pictures_of((64, 64)):
        inputs = example_inputs(model, sizes={"batch": 2, "sequence": 6}, seed=3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(served.generate(**inputs, **options), model.generate(**inputs, **options))
    if kind == "smolvlm":  # whose code drops empty tiles
        inputs["pixel_values"][1, 2] = 0
        with pytest.raises(PeftfxError, match="a part of this image is empty"):
            served.generate(**inputs, **options)


def test_a_forward_of_given_inputs_points_to_the_size_of_pictures(tmp_path: Path) -> None:
    model = build(TASK, "qwen2_vl")
    with pytest.raises(PeftfxError, match=r"(?s)branches on .*\.tolist\(\).*leave inputs out.*--image-size"):
        compiler.export_onnx(model, tmp_path / "out", view="forward", inputs=example_inputs(model))


def test_a_size_is_for_models_whose_processor_makes_many(peftfx: Run, tmp_path: Path) -> None:
    model = build(TASK, "llava")
    with pytest.raises(PeftfxError, match="in the forward view alone"):
        compiler.export_onnx(model, tmp_path / "out", view="decode", image_size=64)
    model.save_pretrained(tmp_path / "base")
    where = ("--base", tmp_path / "base", "--output", tmp_path / "o", "--view", "decode", "--image-size", "64")
    assert_refused(peftfx("export", *where), "in the forward view alone", "leave image_size out")
