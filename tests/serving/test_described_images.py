"""Models that write a text about an image alone, as TrOCR does: a tiny one, token by token what `peft` gives."""

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
from PIL import Image
from support.adapted import randomise
from support.command import Result, assert_refused
from support.words import picture, word_tokenizer

from peftfx.bases.tasks import task_of_class
from peftfx.export.command import export_directory

Run = Callable[..., Result]
SIZE = 32
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
ENDS = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}


def build() -> hf.VisionEncoderDecoderModel:
    seeing = hf.ViTConfig(**LAYERS, image_size=SIZE, patch_size=8, initializer_range=0.3)
    writing = hf.TrOCRConfig(
        vocab_size=60,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        cross_attention_hidden_size=32,
        init_std=0.5,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seeing, writing)
    for name, token in ENDS.items():
        setattr(config, name, token)
    made = hf.VisionEncoderDecoderModel(config)
    made.generation_config = hf.GenerationConfig(**ENDS, max_new_tokens=8)
    return made.eval()


@dataclass
class Describing:
    """A tiny model with a random LoRA, its processor, and what was exported of it."""

    peft: Any
    prepare: hf.ViTImageProcessor
    tokenizer: hf.PreTrainedTokenizerFast
    root: Path

    def says(self, path: Path) -> str:
        pixels = self.prepare(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        return str(self.tokenizer.decode(self.peft.generate(pixels, do_sample=False)[0], skip_special_tokens=True))


@pytest.fixture(scope="module")
def describing(tmp_path_factory: pytest.TempPathFactory) -> Describing:
    root = tmp_path_factory.mktemp("describing")
    torch.manual_seed(0)
    base, prepare = build(), hf.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    table, special = ["<unk>", "<pad>", "<eos>", "<sot>", *(f"w{i}" for i in range(56))], ["<pad>", "<eos>", "<sot>"]
    words = word_tokenizer(table, special, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    for part in (base, prepare, words):
        part.save_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"])).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    for seed in (0, 1):
        picture(root / f"{seed}.png", seed)
    return Describing(model, prepare, words, root)


def test_each_image_is_described_as_by_transformers(describing: Describing, peftfx: Run) -> None:
    paths = [describing.root / f"{seed}.png" for seed in (0, 1)]
    want = [describing.says(path) for path in paths]
    assert want[0] != want[1]
    given = [word for path in paths for word in ("--image", path)]
    result = peftfx("run", describing.root / "out", *given)
    assert result.code == 0, result.err
    assert [line.strip() for line in result.out.splitlines()] == want
    found = peftfx("run", describing.root / "out", *given[:2], "--json")
    assert json.loads(found.out) == {"image": str(paths[0]), "text": want[0]}


def test_a_text_begins_with_the_prompt(describing: Describing, peftfx: Run) -> None:
    path = describing.root / "0.png"
    words = describing.tokenizer("w7", return_tensors="pt", add_special_tokens=False)["input_ids"]
    pixels = describing.prepare(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    tokens = describing.peft.generate(pixels, decoder_input_ids=words, do_sample=False)[0]
    assert tokens[:2].tolist() == [ENDS["decoder_start_token_id"], words.item()]
    want = describing.tokenizer.decode(tokens[2:], skip_special_tokens=True)
    for prompt in ("w7", "<sot>w7"):
        asked = ("run", describing.root / "out", "--image", path, "-p", prompt)
        assert peftfx(*asked).out.strip() == want
        assert json.loads(peftfx(*asked, "--json").out) == {"prompt": prompt, "image": str(path), "text": want}
    assert want != describing.says(path)


def test_a_prompt_without_an_image_is_refused(describing: Describing, peftfx: Run) -> None:
    assert_refused(peftfx("run", describing.root / "out", "-p", "w1"), "pixel_values, not a text", "--image")


def test_classes_of_any_encoder_and_decoder_have_the_task_of_their_table() -> None:
    tasks = {"Vision": "image-text-to-text", "Speech": "automatic-speech-recognition", "": "text2text-generation"}
    assert {kind: task_of_class(f"{kind}EncoderDecoderModel") for kind in tasks} == tasks
    assert task_of_class("CLIPTextModelWithProjection") == "feature-extraction"


def test_classes_with_names_of_their_own_have_the_task_of_their_table() -> None:
    assert task_of_class("NemotronH_Omni_Reasoning_V3") == "image-text-to-text"
    assert task_of_class("BertGenerationDecoder") == "text-generation"
    assert task_of_class("MarianMTModel") == "text2text-generation"
    assert task_of_class("MarianModel") == "feature-extraction"
    assert task_of_class("TimmBackbone") is None
    assert task_of_class("Module") is None
