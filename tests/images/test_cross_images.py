"""A decoder whose layers attend to an image beside its text, as Llama 3.2 Vision's: two graphs, one of images."""

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
from support.words import word_tokenizer
from torch import Tensor

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.export.command import export_directory

pytestmark = pytest.mark.further

Run = Callable[..., Result]
IMAGE, SIZE, TILES, NEW = "<|image|>", 32, 4, 6
SHAPES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]  #: of up to four tiles
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def processor(image_token: int) -> hf.MllamaProcessor:
    table = {word: i for i, word in enumerate(["<unk>", "<pad>", "<s>", *(f"w{i}" for i in range(3, image_token))])}
    ends = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = word_tokenizer(table | {IMAGE: image_token}, [IMAGE, "<pad>", "<s>"], padding_side="left", **ends)
    sizes = {"size": {"height": SIZE, "width": SIZE}, "max_image_tiles": TILES}
    return hf.MllamaProcessor(hf.MllamaImageProcessor(**sizes), words)


@dataclass
class Seeing:
    """A tiny model with a random LoRA, its processor, and what was exported of it."""

    peft: Any
    processor: Any
    root: Path

    def made(self, *asked: tuple[str, Path]) -> dict[str, Tensor]:
        images = [[Image.open(path).convert("RGB")] for _, path in asked]
        texts = [f"{IMAGE} {text}" for text, _ in asked]
        return dict(self.processor(text=texts, images=images, return_tensors="pt", padding=True))

    def several(self, asked: list[tuple[str, list[int]]]) -> dict[str, Tensor]:
        images = [[Image.open(self.root / f"{i}.png").convert("RGB") for i in own] for _, own in asked]
        texts = [text for text, _ in asked]
        made = dict(self.processor(text=texts, images=images, return_tensors="pt", padding=True))
        for name in ("aspect_ratio_ids", "aspect_ratio_mask"):  # the processor leaves out last rows without an image
            rest = made[name].new_zeros(len(asked) - len(made[name]), *made[name].shape[1:])
            if name.endswith("mask"):
                rest[:, :, 0] = 1  # as it has it for empty images
            made[name] = torch.cat([made[name], rest])
        return made


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    root = tmp_path_factory.mktemp("crossed")
    config = build("image-text-to-text", "mllama").config
    config.name_or_path, config.vision_config.supported_aspect_ratios = "", [list(shape) for shape in SHAPES]
    torch.manual_seed(0)
    base = hf.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that the image decides what is written
        for name, parameter in base.named_parameters():
            if "gate" in name:
                parameter.fill_(2.0)
            elif "cross_attn" in name or "multi_modal_projector" in name:
                parameter.mul_(4)
    base.generation_config = hf.GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=0)
    made = processor(base.config.image_token_index)
    for part in (base, made):
        part.save_pretrained(root / "base")
    targets = ["q_proj", "k_proj", "v_proj", "fc1", "multi_modal_projector"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets)).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    for seed, shape in enumerate(((70, 50), (30, 90), (32, 32))):  # of other numbers of tiles
        pixels = torch.randint(256, (5, 7, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize(shape).save(root / f"{seed}.png")
    return Seeing(model, made, root)


def test_the_runtime_writes_what_transformers_writes(seeing: Seeing) -> None:
    served = runtime.load(seeing.root / "out")
    both = seeing.made(("w7 w8 w9", seeing.root / "0.png"), ("w10", seeing.root / "1.png"))
    assert not bool(both["attention_mask"].all())
    assert bool((both["aspect_ratio_ids"][0] != both["aspect_ratio_ids"][1]).all())
    said = []
    for given in (both, seeing.made(("w7 w8 w9", seeing.root / "2.png")), seeing.made(("w7", seeing.root / "0.png"))):
        for more in ({}, {"num_beams": 3}, {"use_cache": False}):
            want = seeing.peft.generate(**given, **OPTIONS, **more)
            assert torch.equal(served.generate(**given, **OPTIONS, **more), want)
            said.append(want[0, -NEW:].tolist())
    assert len({tuple(tokens) for tokens in said}) > 1


def test_a_text_without_an_image_is_read_as_such(seeing: Seeing) -> None:
    served = runtime.load(seeing.root / "out")
    text = {"input_ids": torch.tensor([[2, 20, 21, 22], [1, 2, 23, 24]])}
    text["attention_mask"] = (text["input_ids"] != 1).long()
    for given in (text, {name: value[:1] for name, value in text.items()}):
        assert torch.equal(served.generate(**given, **OPTIONS), seeing.peft.generate(**given, **OPTIONS))


@pytest.mark.slow
def test_an_adapted_model_on_the_graph_road_writes_the_same(seeing: Seeing) -> None:
    base = hf.MllamaForConditionalGeneration.from_pretrained(seeing.root / "base")
    adapted = compiler.load(base, seeing.root / "adapter", road="graph")
    given = seeing.made(("w7 w8 w9", seeing.root / "1.png"), ("w10", seeing.root / "0.png"))
    assert torch.equal(adapted.generate(**given, **OPTIONS), seeing.peft.generate(**given, **OPTIONS))


def test_what_the_graphs_do_not_take_is_refused(seeing: Seeing) -> None:
    served = runtime.load(seeing.root / "out")
    given = seeing.made(("w7 w8 w9", seeing.root / "0.png"))
    with pytest.raises(PeftfxError, match=r"needs the mask of its image's pieces \[cross_attention_mask\]"):
        served.generate(**{name: value for name, value in given.items() if name != "cross_attention_mask"}, **OPTIONS)
    two = seeing.several([(f"{IMAGE} w7", [0]), (f"{IMAGE} w8", [1])])
    two["cross_attention_mask"] = two["cross_attention_mask"].repeat(1, 1, 2, 1)
    with pytest.raises(PeftfxError, match=r"takes a mask \[2, 3, 1, 4\], and this call has \[2, 3, 2, 4\]"):
        served.generate(**two, **OPTIONS)
    more = {name: value[:1] for name, value in two.items() if name in ("input_ids", "attention_mask")} | {
        name: value for name, value in two.items() if name.startswith(("pixel", "aspect"))
    }
    with pytest.raises(PeftfxError, match="needs the mask"):
        served.generate(**more, **OPTIONS)
    odd = {**two, **{n: v[:1] for n, v in two.items() if n.startswith(("pixel", "aspect"))}}
    with pytest.raises(PeftfxError, match="each text has as many images as the others, or empty ones"):
        served.generate(**odd, **OPTIONS)


def test_texts_have_different_numbers_of_images(seeing: Seeing) -> None:
    served, asked = runtime.load(seeing.root / "out"), {"output_logits": True, "return_dict_in_generate": True}
    texts = [(f"{IMAGE} w7 {IMAGE} w8 w9", [0, 1]), (f"w5 {IMAGE} w10", [2]), ("w11 w12", [])]
    batches = (texts, texts[:1], texts[1:], [(f"{IMAGE} {IMAGE} w7 {IMAGE} w4", [2, 0, 1]), *texts[::-1]])
    for chosen in batches:
        given = seeing.several(chosen)
        assert given["pixel_values"].shape[1] == max(len(images) for _, images in chosen)
        for more in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
            want = seeing.peft.generate(**given, **OPTIONS, **asked, **more)
            found = served.generate(**given, **OPTIONS, **asked, **more)
            assert torch.equal(found.sequences, want.sequences)
            for own, logits in zip(found.logits, want.logits, strict=True):
                torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-3)
    swapped = seeing.several([(f"{IMAGE} w7 {IMAGE} w8 w9", [1, 0])])
    given = seeing.several(texts[:1])
    assert not torch.equal(served.generate(**swapped, **OPTIONS), served.generate(**given, **OPTIONS))


def test_the_command_answers_a_prompt_about_images(seeing: Seeing, peftfx: Run) -> None:
    path = seeing.root / "0.png"
    given = seeing.made(("w7 w8", path))
    tokens = seeing.peft.generate(**given, max_new_tokens=NEW, do_sample=False)[0, given["input_ids"].shape[1] :]
    want = seeing.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    asked = ("--image", path, "-p", "w7 w8", "--json", "--max-new-tokens", NEW)
    result = peftfx("run", seeing.root / "out", *asked)
    assert result.code == 0, result.err
    assert json.loads(result.out)["text"] == want
    two = seeing.several([(f"{IMAGE} w7 {IMAGE} w8", [0, 1])])
    tokens = seeing.peft.generate(**two, max_new_tokens=NEW, do_sample=False)[0, two["input_ids"].shape[1] :]
    want = seeing.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    files = ("--image", path, "--image", seeing.root / "1.png")
    asked = ("-p", f"{IMAGE} w7 {IMAGE} w8", "--json", "--max-new-tokens", NEW)
    result = peftfx("run", seeing.root / "out", *files, *asked)
    assert result.code == 0, result.err
    assert json.loads(result.out)["text"] == want


def test_a_dry_run_tells_the_files_of_the_export(seeing: Seeing, peftfx: Run) -> None:
    words = ("export", "--base", seeing.root / "base", "--output", seeing.root / "new", "--view", "decode")
    told = json.loads(peftfx(*words, "--adapter", seeing.root / "adapter", "--dry-run", "--json").out)
    assert set(told["files"]) == {path.name for path in (seeing.root / "out").iterdir()}


@pytest.mark.slow
def test_a_rounded_export_is_measured_on_a_text_of_its_own(seeing: Seeing) -> None:
    base = hf.MllamaForConditionalGeneration.from_pretrained(seeing.root / "base")
    report = compiler.export_onnx(base, seeing.root / "rounded", view="decode", quantize="int8")
    assert "its own greedy text" in {agreed.text for agreed in report.agreement.values()}
