"""Prompts with images: a tiny model of text and images, token by token what transformers and `peft` give."""

from __future__ import annotations

import json
import threading
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
from torch import nn

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.generation import step

Run = Callable[..., Result]
IMAGE, SIZE, NEW = "<image>", 32, 8


def processor() -> hf.LlavaProcessor:
    table = ["<unk>", "<pad>", "<eos>", IMAGE, "USER", *(f"w{i}" for i in range(90))]
    special = [IMAGE, "<pad>", "<eos>"]
    words = word_tokenizer(table, special, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    words.image_token, words.image_token_id = IMAGE, 3
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    template = (
        "{% for m in messages %}USER {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(**sizes),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build() -> hf.LlavaForConditionalGeneration:
    torch.manual_seed(3)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    text = hf.LlamaConfig(
        **layers, vocab_size=95, initializer_range=0.3, pad_token_id=1, eos_token_id=2, bos_token_id=2
    )
    vision = hf.CLIPVisionConfig(**layers, image_size=SIZE, patch_size=8, initializer_range=0.3)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3, vision_feature_layer=-2)
    config.image_token_index = 3
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
    model.generation_config = hf.GenerationConfig(pad_token_id=1, eos_token_id=2, bos_token_id=2)
    return model.eval()


@dataclass
class Seeing:
    """A tiny model of text and images with a random LoRA, its processor, and what was exported of it."""

    peft: nn.Module
    processor: Any
    root: Path
    directory: Path

    def says(self, prompt: str, *images: Path, **options: Any) -> str:
        """What `peft` and transformers' processor continue the prompt with."""
        opened = [Image.open(path).convert("RGB") for path in images]
        made = self.processor(text=prompt, images=opened, return_tensors="pt")
        tokens = self.peft.generate(**made, max_new_tokens=NEW, do_sample=False, **options)
        return self.processor.tokenizer.decode(tokens[0, made["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    from peftfx.export.command import export_directory

    root = tmp_path_factory.mktemp("seeing")
    base = build()
    base.save_pretrained(root / "base")
    made = processor()
    made.save_pretrained(root / "base")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1", "down_proj"])
    model = peft.get_peft_model(base, options).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    for seed in (0, 1):
        picture(root / f"{seed}.png", seed)
    return Seeing(model, made, root, root / "out")


def test_an_image_and_a_prompt_are_continued_as_by_transformers(seeing: Seeing, peftfx: Run) -> None:
    said = []
    for seed in (0, 1):
        path = seeing.root / f"{seed}.png"
        result = peftfx("run", seeing.directory, "--image", path, "--prompt", "w5 w6 w7", "--max-new-tokens", NEW)
        assert result.code == 0, result.err
        said.append(result.out.strip())
        assert said[-1] == seeing.says(f"{IMAGE} w5 w6 w7", path)
    assert said[0] != said[1]  # the image is seen


def test_two_images_go_where_the_prompt_has_their_tokens(seeing: Seeing, peftfx: Run) -> None:
    paths = [seeing.root / f"{seed}.png" for seed in (0, 1)]
    prompt = f"w5 {IMAGE} w6 {IMAGE} w7"
    given = [word for path in paths for word in ("--image", path)]
    result = peftfx("run", seeing.directory, *given, "--prompt", prompt, "--max-new-tokens", NEW, "--json")
    found = json.loads(result.out)
    assert found["text"] == seeing.says(prompt, *paths)
    assert found["images"] == [str(path) for path in paths]


def test_the_chat_template_places_the_image(seeing: Seeing, peftfx: Run) -> None:
    path = seeing.root / "0.png"
    result = peftfx("run", seeing.directory, "--image", path, "-p", "w5", "--chat", "--max-new-tokens", NEW)
    assert result.out.strip() == seeing.says(f"USER {IMAGE} w5", path)


def test_text_alone_and_a_batch_and_beams_are_generated_too(seeing: Seeing) -> None:
    served = runtime.load(seeing.directory)
    tokenizer = seeing.processor.tokenizer
    tokenizer.padding_side = "left"
    texts = [f"{IMAGE} w5 w6", f"w9 w8 w7 {IMAGE} w6 w5"]
    images = [Image.open(seeing.root / f"{seed}.png").convert("RGB") for seed in (0, 1)]
    made = seeing.processor(text=texts, images=images, return_tensors="pt", padding=True)
    options = {"max_new_tokens": NEW, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        assert torch.equal(served.generate(**made, **options, **more), seeing.peft.generate(**made, **options, **more))
    text = tokenizer(["w5 w6 w7"], return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(served.generate(**text, **options), seeing.peft.generate(**text, **options))


def test_two_threads_ask_about_two_images(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of one waits for the same step of the other, between what it keeps for its call and the graph's run."""
    served, said, both = runtime.load(seeing.directory), {}, threading.Barrier(2, timeout=60)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    made = [
        seeing.processor(text=f"{IMAGE} {text}", images=[Image.open(seeing.root / name)], return_tensors="pt")
        for text, name in (("w5 w6 w7", "0.png"), ("w9 w8", "1.png"))
    ]
    own = step.step_inputs

    def together(*arguments: Any) -> dict[str, torch.Tensor]:
        both.wait()
        return own(*arguments)

    def ask(number: int) -> None:
        said[number] = served.generate(**made[number], **options)

    with monkeypatch.context() as patched:
        patched.setattr(step, "step_inputs", together)
        threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, given in enumerate(made):
        assert torch.equal(said[number], served.generate(**given, **options))


def test_the_adapted_model_generates_so_in_torch(seeing: Seeing) -> None:
    ours = compiler.load(build(), seeing.root / "adapter", road="graph")
    made = seeing.processor(
        text=f"{IMAGE} w5 w6 w7", images=[Image.open(seeing.root / "1.png").convert("RGB")], return_tensors="pt"
    )
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(ours.generate(**made, **options), seeing.peft.generate(**made, **options))


def test_what_does_not_go_together_is_refused(seeing: Seeing, peftfx: Run, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"\x89PNG, but no more")
    assert_refused(peftfx("run", seeing.directory, "--image", tmp_path / "no.png", "-p", "w5"), "cannot be read")
    assert_refused(peftfx("run", seeing.directory, "--image", tmp_path / "none.png", "-p", "w5"), "no such image")
    served = runtime.load(seeing.directory)
    with pytest.raises(PeftfxError, match="has 1 image tokens, and its images 16 pieces"):
        served(input_ids=torch.tensor([[3, 5]]), pixel_values=torch.zeros(1, 3, SIZE, SIZE))
