"""An encoder-decoder that reads images in the text that it encodes, as Florence-2 does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from PIL import Image
from support.adapted import randomise
from support.command import Result
from support.words import picture, word_tokenizer

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.errors import PeftfxWarning
from peftfx.export.command import export_directory

pytestmark = pytest.mark.further

Run = Callable[..., Result]
IMAGE, SIZE, PIECES = "<image>", 32, 17
OPTIONS = {"max_new_tokens": 7, "min_new_tokens": 5, "do_sample": False}


def processor(image_token: int) -> hf.Florence2Processor:
    table = {word: i for i, word in enumerate(["<unk>", "<pad>", "<s>", "</s>", *(f"w{i}" for i in range(4, 98))])}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special = [IMAGE, "<pad>", "<s>", "</s>"]
    words = word_tokenizer(table | {IMAGE: image_token}, special, extra_special_tokens={"image_token": IMAGE}, **ends)
    sizes = {"size": {"height": SIZE, "width": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    pictures = hf.CLIPImageProcessor(**sizes)
    pictures.image_seq_length = PIECES
    return hf.Florence2Processor(image_processor=pictures, tokenizer=words)


@dataclass
class Seeing:
    """A tiny model with a random LoRA, its processor, and what was exported of it."""

    peft: Any
    processor: Any
    root: Path

    def made(self, prompts: list[str], *images: Path) -> Any:
        opened = [Image.open(path).convert("RGB") for path in images]
        return self.processor(text=prompts, images=opened, return_tensors="pt", padding=True)

    def says(self, prompt: str, path: Path) -> str:
        tokens = self.peft.generate(**self.made([prompt], path), **OPTIONS)
        return str(self.processor.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    root = tmp_path_factory.mktemp("seeing")
    base = build("image-text-to-text", "florence2")
    base.config.name_or_path = ""
    torch.manual_seed(0)
    with torch.no_grad():  # so that the image decides what is written
        for name, parameter in base.named_parameters():
            if "encoder_attn" in name or "image_projection" in name:
                parameter.mul_(8)
    base.generation_config = hf.GenerationConfig(
        pad_token_id=1, eos_token_id=3, decoder_start_token_id=4, **{n: OPTIONS[n] for n in list(OPTIONS)[:2]}
    )
    made = processor(base.config.image_token_id)
    for part in (base, made):
        part.save_pretrained(root / "base")
    targets = ["q_proj", "v_proj", "fc1", "qkv", "image_projection"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets)).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    for seed in (0, 1):
        picture(root / f"{seed}.png", seed)
    return Seeing(model, made, root)


def test_the_runtime_writes_what_transformers_writes(seeing: Seeing) -> None:
    served = runtime.load(seeing.root / "out")
    both = seeing.made(["w7 w8 w9", "w10"], seeing.root / "0.png", seeing.root / "1.png")
    assert not bool(both["attention_mask"].all())
    for given in (both, {name: value[:1] for name, value in both.items()}):
        for more in ({}, {"num_beams": 3}):
            assert torch.equal(
                served.generate(**given, **OPTIONS, **more), seeing.peft.generate(**given, **OPTIONS, **more)
            )
    text = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(served.generate(**text, **OPTIONS), seeing.peft.generate(**text, **OPTIONS))


def test_a_call_of_the_graphs_gives_the_logits_of_the_model(seeing: Seeing) -> None:
    given = {**seeing.made(["w7 w8"], seeing.root / "0.png"), "decoder_input_ids": torch.tensor([[4, 9, 8]])}
    got = runtime.load(seeing.root / "out")(**given).logits
    torch.testing.assert_close(got, seeing.peft(**given).logits, atol=1e-4, rtol=1e-4)


def test_a_text_without_a_place_for_its_image_is_refused(seeing: Seeing) -> None:
    served = runtime.load(seeing.root / "out")
    pixels = seeing.made(["w7"], seeing.root / "0.png")["pixel_values"]
    with pytest.raises(PeftfxError, match=f"0 image tokens, and its images {PIECES} pieces"):
        served.generate(input_ids=torch.tensor([[2, 7, 3]]), pixel_values=pixels)


def test_the_command_answers_a_prompt_about_an_image(seeing: Seeing, peftfx: Run) -> None:
    """The processor puts the image before the prompt, and writes some prompts (`<CAPTION>`) out."""
    said = []
    for prompt in ("w7 w8", "<CAPTION>", ""):
        for seed in (0, 1):
            path = seeing.root / f"{seed}.png"
            asked = ("-p", prompt) if prompt else ()
            result = peftfx("run", seeing.root / "out", "--image", path, *asked, "--json", "--max-new-tokens", 7)
            assert result.code == 0, result.err
            said.append(json.loads(result.out)["text"])
            assert said[-1] == seeing.says(prompt, path)
    assert len(set(said)) > 2


@pytest.mark.slow
def test_an_adapted_model_generates_what_its_base_with_the_adapter_generates(seeing: Seeing) -> None:
    base = hf.Florence2ForConditionalGeneration.from_pretrained(seeing.root / "base")
    adapted = compiler.load(base, seeing.root / "adapter", road="graph")
    given = seeing.made(["w7 w8 w9", "w10"], seeing.root / "1.png", seeing.root / "0.png")
    assert torch.equal(adapted.generate(**given, **OPTIONS), seeing.peft.generate(**given, **OPTIONS))


def test_a_dry_run_tells_the_files_of_the_export(seeing: Seeing, peftfx: Run) -> None:
    words = ("export", "--base", seeing.root / "base", "--output", seeing.root / "new", "--view", "decode")
    told = json.loads(peftfx(*words, "--adapter", seeing.root / "adapter", "--dry-run", "--json").out)
    assert set(told["files"]) == {path.name for path in (seeing.root / "out").iterdir()}
    assert told["views"] == ["vision", "encoder", "decoder"]


@pytest.mark.slow
def test_adapters_are_swapped_beside_images(seeing: Seeing, tmp_path: Path) -> None:
    """In the three graphs: of images, of the text that is encoded, and of the text that is written."""
    base = hf.Florence2ForConditionalGeneration.from_pretrained(seeing.root / "base")
    compiler.export_onnx(base, tmp_path / "out", view="decode", slots="all-linear")
    adapted = compiler.load(base, seeing.root / "adapter")
    served = runtime.load(tmp_path / "out")
    served.load_adapter(compiler.export_adapter(adapted, tmp_path / "out", tmp_path / "made"), "made")
    given = seeing.made(["w7 w8 w9", "w10"], seeing.root / "0.png", seeing.root / "1.png")
    said = {}
    for name in ("made", None):
        served.set_adapter(name)
        said[name] = served.generate(**given, **OPTIONS)
    assert torch.equal(said["made"], seeing.peft.generate(**given, **OPTIONS))
    with seeing.peft.disable_adapter():
        assert torch.equal(said[None], seeing.peft.generate(**given, **OPTIONS))
    assert not torch.equal(said["made"], said[None])


@pytest.mark.slow
def test_the_merged_decoder_of_optimum_is_written_beside(tmp_path: Path) -> None:
    base = build("image-text-to-text", "florence2")
    compiler.export_onnx(base, tmp_path / "out", view="decode", merged_decoder=True)
    assert (tmp_path / "out" / "decoder_model_merged.onnx").exists()


@pytest.mark.slow
def test_pictures_of_an_untold_size_are_left_out_until_one_is_chosen(seeing: Seeing, tmp_path: Path) -> None:
    """The config of this model has no size, so without a processor an example of a picture would be a guess."""
    base = build("image-text-to-text", "florence2")
    base.config.name_or_path = ""
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(PeftfxWarning, match="tells the size of pictures, which --image-size HEIGHTxWIDTH"):
        export_directory(tmp_path / "base", tmp_path / "text", view="decode")
    export_directory(tmp_path / "base", tmp_path / "out", view="decode", image_size=(SIZE, SIZE))
    assert not (tmp_path / "text" / "vision_encoder.onnx").exists()
    assert runtime.load(tmp_path / "out").images.inputs == (("pixel_values", (1, 3, SIZE, SIZE)),)
