"""Models whose own `generate` runs an image encoder, and then the `generate` of a language model, as BLIP-2's does."""

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
from every_model.checks import build as tiny
from PIL import Image
from support.adapted import randomise
from support.command import Result
from support.words import picture, word_tokenizer
from torch import Tensor

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.bases.processors.writers import writer_of
from peftfx.export.command import export_directory

pytestmark = pytest.mark.further

Run = Callable[..., Result]
SIZE, PIECES, IMAGE, NEW = 32, 4, 59, 6
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
ENDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 7}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "max_position_embeddings": 64}
TEXTS = {
    "opt": hf.OPTConfig(**LAYERS, **OPT, **ENDS, vocab_size=60),
    "llama": hf.LlamaConfig(**LAYERS, **ENDS, intermediate_size=48, vocab_size=60),
}


def build(kind: str) -> hf.Blip2ForConditionalGeneration:
    torch.manual_seed(0)
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**LAYERS, intermediate_size=48, image_size=SIZE, patch_size=8),
        qformer_config=hf.Blip2QFormerConfig(
            **LAYERS, intermediate_size=48, encoder_hidden_size=32, cross_attention_frequency=1
        ),
        text_config=TEXTS[kind],
        num_query_tokens=PIECES,
        image_token_index=IMAGE,
    )
    model = hf.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that the image decides what is written
        model.query_tokens.normal_()
        model.language_projection.weight.mul_(4)
    return model


def tokenizer(image: int = IMAGE) -> hf.PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "<s>", *(f"w{i}" for i in range(3, image)), "<image>"]
    special = ["<image>", "<pad>", "<s>"]
    return word_tokenizer(words, special, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")


def processor() -> hf.Blip2Processor:
    return hf.Blip2Processor(image_processor=pictures(), tokenizer=tokenizer(), num_query_tokens=PIECES)


def pictures() -> hf.BlipImageProcessor:
    return hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE})


@dataclass
class Writing:
    """A tiny model with a random LoRA, and what was exported of it."""

    peft: Any
    root: Path


@pytest.fixture(
    scope="module", params=[pytest.param(k, marks=pytest.mark.slow if k == "opt" else ()) for k in sorted(TEXTS)]
)
def writing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writing:
    root = tmp_path_factory.mktemp(request.param)
    base = build(request.param)
    for part in (base, processor()):
        part.save_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv", "query"])).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    return Writing(model, root)


def texts() -> dict[str, Tensor]:
    """Two texts with an image each, one of them padded on the left."""
    image = [IMAGE] * PIECES
    rows = [[*image, 2, 20, 21, 22], [1, 1, *image, 2, 23]]
    ids = torch.tensor(rows)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids != 1).long()}


def test_the_runtime_writes_what_the_model_writes(writing: Writing) -> None:
    served = runtime.load(writing.root / "out")
    both = texts()
    for given in (both, {name: value[:1] for name, value in both.items()}):
        for more in ({}, {"num_beams": 3}, {"min_new_tokens": NEW}):
            options = {"max_new_tokens": NEW, "do_sample": False, **more}
            assert torch.equal(served.generate(**given, **options), writing.peft.generate(**given, **options))
    assert served.generation_config.eos_token_id == ENDS["eos_token_id"]  # the language model's


@pytest.mark.slow
def test_an_adapted_model_writes_what_its_base_with_the_adapter_writes(writing: Writing) -> None:
    base = hf.Blip2ForConditionalGeneration.from_pretrained(writing.root / "base")
    assert writer_of(base) is base.language_model
    adapted, options = (
        compiler.load(base, writing.root / "adapter", road="graph"),
        {"max_new_tokens": NEW, "do_sample": False},
    )
    assert torch.equal(adapted.generate(**texts(), **options), writing.peft.generate(**texts(), **options))


def test_images_without_a_text_are_refused(writing: Writing) -> None:
    with pytest.raises(PeftfxError, match="need a text with a token for each piece"):
        runtime.load(writing.root / "out").generate(pixel_values=texts()["pixel_values"])


def test_the_command_goes_on_with_a_prompt(writing: Writing, peftfx: Run) -> None:
    path, made = picture(writing.root / "0.png", 0), processor()
    given = made(text="w20 w21", images=Image.open(path), return_tensors="pt")
    tokens = writing.peft.generate(**given, max_new_tokens=NEW, do_sample=False)
    want = made.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = ("--image", path, "-p", "w20 w21", "--max-new-tokens", NEW, "--json")
    result = peftfx("run", writing.root / "out", *asked)
    assert result.code == 0, result.err
    assert json.loads(result.out)["text"] == want


def test_a_dry_run_finds_the_views_of_an_export(writing: Writing, peftfx: Run) -> None:
    words = ("export", "--base", writing.root / "base", "--output", writing.root / "new", "--view", "decode")
    told = json.loads(peftfx(*words, "--dry-run", "--json").out)
    assert set(told["files"]) == {path.name for path in (writing.root / "out").iterdir()}


@pytest.mark.slow
def test_a_text_that_the_image_encoder_reads_may_have_any_length(tmp_path: Path, peftfx: Run) -> None:
    """The Q-Former of InstructBLIP reads the prompt too."""
    base = tiny("image-text-to-text", "instructblip")
    base.language_model.generation_config.update(min_new_tokens=NEW, max_new_tokens=NEW)
    compiler.export_onnx(base, tmp_path / "out", view="decode")
    served, image = runtime.load(tmp_path / "out"), [base.config.image_token_id] * PIECES
    assert served.images.beside == ("qformer_input_ids", "qformer_attention_mask")
    given = {"input_ids": torch.tensor([[*image, 20, 21], [*image, 22, 23]])}
    given["qformer_input_ids"] = torch.tensor([[20, 21, 24], [22, 23, 0]])
    given["qformer_attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    given["pixel_values"] = texts()["pixel_values"]
    for call in (given, {name: value[1:, :5] if "qformer" in name else value[1:] for name, value in given.items()}):
        for more in ({}, {"num_beams": 2}):
            options = {"max_new_tokens": NEW, "do_sample": False, **more}
            assert torch.equal(served.generate(**call, **options), base.generate(**call, **options))
    parts = {"tokenizer": tokenizer(base.config.image_token_id), "qformer_tokenizer": tokenizer(90)}
    made = hf.InstructBlipProcessor(pictures(), **parts, num_query_tokens=PIECES)
    made.save_pretrained(tmp_path / "out")
    path = picture(tmp_path / "0.png", 0)
    call = made(text="w20 w21", images=Image.open(path), return_tensors="pt")
    tokens = base.generate(**call, max_new_tokens=NEW, do_sample=False)[0, call["input_ids"].shape[1] :]
    asked = ("--image", path, "-p", "w20 w21", "--max-new-tokens", NEW, "--json")
    result = peftfx("run", tmp_path / "out", *asked)
    assert result.code == 0, result.err
    assert json.loads(result.out)["text"] == made.tokenizer.decode(tokens, skip_special_tokens=True)


def test_what_the_graphs_of_images_lack_is_said(tmp_path: Path) -> None:
    wrong = {"blip": "generates by its text_decoder", "ovis2": "the code reads visual_indicator_features"}
    for kind, message in wrong.items():
        with pytest.raises(PeftfxError, match=message):
            compiler.export_onnx(tiny("image-text-to-text", kind), tmp_path / kind, view="decode")
