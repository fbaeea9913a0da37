"""Prompts with images for models whose attention reads the types of tokens: Gemma 3's and PaliGemma's, tiny."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import SEEING, build, check
from every_model.checks import Result as Checked
from PIL import Image
from support.adapted import randomise
from support.command import Result
from support.words import picture, word_tokenizer
from torch import nn

from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.token_types import reads_types
from peftfx.export.command import export_directory

pytestmark = pytest.mark.further

Run = Callable[..., Result]
IMAGE, SIZE, PIECES = "<image>", 32, 4
WORDS = ["<unk>", "<pad>", "<eos>", IMAGE, "<boi>", "<eoi>", "<bos>"]
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
TEXT = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 95, "initializer_range": 0.3}
ENDS = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 6}


def words() -> hf.PreTrainedTokenizerFast:
    extra = {"image_token": IMAGE, "boi_token": "<boi>", "eoi_token": "<eoi>"}
    ends = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return word_tokenizer([*WORDS, *(f"w{i}" for i in range(88))], WORDS, **ends, extra_special_tokens=extra)


def images(**more: object) -> hf.SiglipImageProcessor:
    return hf.SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, **more)


def gemma() -> tuple[nn.Module, Any]:
    text = hf.Gemma3TextConfig(**TEXT, **ENDS, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    vision = hf.SiglipVisionConfig(**LAYERS, image_size=SIZE, patch_size=8)
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=PIECES,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    made = hf.Gemma3ForConditionalGeneration(config)
    return made, hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}), words(), None, PIECES
    )


def paligemma() -> tuple[nn.Module, Any]:
    text = hf.GemmaConfig(**TEXT, **ENDS)
    vision = hf.SiglipVisionConfig(**LAYERS, image_size=SIZE, patch_size=16, projection_dim=32)
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=3)
    made = hf.PaliGemmaForConditionalGeneration(config)
    return made, hf.PaliGemmaProcessor(images(image_seq_length=PIECES), words())


@dataclass
class Seeing:
    """A tiny model with a random LoRA, its processor, what was exported of it, and a prompt with its image's token."""

    peft: Any
    processor: Any
    directory: Path
    image: Path
    prompt: str

    def given(self) -> dict[str, Any]:
        picture = Image.open(self.image).convert("RGB")
        made = self.processor(text=self.prompt, images=[picture], return_tensors="pt")
        return {name: value for name, value in made.items() if name != "labels"}


@pytest.fixture(scope="module", params=[(gemma, "<boi>"), (paligemma, IMAGE)], ids=["gemma3", "paligemma"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    build, token = request.param
    root = tmp_path_factory.mktemp(build.__name__)
    torch.manual_seed(0)
    base, processor = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.generation_config = hf.GenerationConfig(**ENDS)
    base.eval().save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    return Seeing(model, processor, root / "out", picture(root / "image.png", 0), f"{token} w5 w6 w7")


def test_the_tokens_are_transformers_own(seeing: Seeing, peftfx: Run) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    given = seeing.given()
    assert {"input_ids", "attention_mask", "token_type_ids", "pixel_values"} <= set(given)
    want = seeing.peft.generate(**given, **options)
    assert torch.equal(runtime.load(seeing.directory).generate(**given, **options), want)
    word = ("--image", seeing.image, "--prompt", "w5 w6 w7", "--max-new-tokens", "8")
    result = peftfx("run", seeing.directory, *word)
    assert result.code == 0, result.err
    said = seeing.processor.tokenizer.decode(want[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result.out.strip() == said.strip()


def test_types_decide_what_tokens_of_an_image_see(seeing: Seeing) -> None:
    given, served = seeing.given(), runtime.load(seeing.directory)
    other = {**given, "token_type_ids": 1 - given["token_type_ids"]}
    for call in (given, other):
        with torch.no_grad():
            first = {**call, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}
            want = seeing.peft.generate(**first, do_sample=False).logits[0]
        got = served.generate(**first, do_sample=False).logits[0]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_an_example_has_the_types_that_a_processor_makes(seeing: Seeing) -> None:
    model = seeing.peft.base_model.model
    made, given = example_inputs(model), seeing.given()
    if "Gemma3" in type(model).__name__:
        assert torch.equal(made["token_type_ids"], (made["input_ids"] == 3).long())
        assert torch.equal(given["token_type_ids"], (given["input_ids"] == 3).long())
    else:
        assert not made["token_type_ids"].any()
        assert not given["token_type_ids"].any()


def test_text_alone_is_generated_if_its_types_are_known(seeing: Seeing) -> None:
    served, text = runtime.load(seeing.directory), {"input_ids": torch.tensor([[20, 21, 22, 23]])}
    if "Gemma3" in type(seeing.peft.base_model.model).__name__:  # a token of type 0 is text
        assert torch.equal(served.generate(**text, max_new_tokens=4), seeing.peft.generate(**text, max_new_tokens=4))
        with torch.no_grad():
            torch.testing.assert_close(served(**text).logits, seeing.peft(**text).logits, atol=1e-4, rtol=1e-4)
        return
    for call in (lambda: served.generate(**text, max_new_tokens=4), lambda: served(**text)):
        with pytest.raises(PeftfxError, match="needs the types"):  # a token of type 0 is of the prefix
            call()


def test_types_are_read_under_another_name_if_the_masks_depend_on_them() -> None:
    assert not reads_types(build(SEEING, "gemma4")), "it is causal unless its config says otherwise"
    assert reads_types(build(SEEING, "gemma4_unified"))
    assert check(SEEING, "gemma4_unified", "decode") == Checked("equal")
