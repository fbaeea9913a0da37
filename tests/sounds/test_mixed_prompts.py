"""Prompts with images and sounds on the command line: token by token what transformers' processor and `peft` give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
from sounds.seeing import SIZE, made, saved
from sounds.test_sound_prompts import write
from support.command import Result, assert_refused
from support.words import picture, word_tokenizer

from peftfx.export.command import export_directory
from peftfx.serving.runs.image_prompts import read_image
from peftfx.serving.sound import read_wav, resample

pytestmark = pytest.mark.further

Run = Callable[..., Result]
KIND, RATE, NEW = "gemma4_unified", 16_000, 5
IMAGE, SOUND = "<image>", "<sound>"
TEMPLATE = (
    "{% for m in messages %}w9 {% for c in m['content'] %}{% if c['type'] == 'audio' %}<sound> "
    "{% elif c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def processor() -> hf.ProcessorMixin:
    """A processor as the type has it, whose tokens are those of the tiny model."""
    names = {98: IMAGE, 96: SOUND, 97: "<|video|>", 90: "<i>", 91: "</i>", 92: "<s>", 93: "</s>"}
    names |= {0: "<unk>", 1: "<pad>", 2: "<eos>"}
    table = {names.get(i, f"w{i}"): i for i in range(99)}
    tokens = {"image_token": IMAGE, "boi_token": "<i>", "eoi_token": "</i>"}
    tokens |= {"audio_token": SOUND, "boa_token": "<s>", "eoa_token": "</s>"}
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    words = word_tokenizer(table, names.values(), **special, extra_special_tokens=tokens)
    grid = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    return hf.Gemma4UnifiedProcessor(
        feature_extractor=hf.Gemma4UnifiedAudioFeatureExtractor(feature_size=40, audio_samples_per_token=40),
        image_processor=hf.Gemma4UnifiedImageProcessor(**grid),
        tokenizer=words,
        video_processor=hf.Gemma4UnifiedVideoProcessor(**grid),
        chat_template=TEMPLATE,
    )


@dataclass
class Mixed:
    """A tiny model of text, images and sounds with a random LoRA, its processor, and what was exported of it."""

    peft: peft.PeftModel
    processor: Any
    root: Path

    def says(self, prompt: str, **beside: list[Any]) -> str:
        """What `peft` and transformers' processor continue the prompt with."""
        given = self.processor(text=prompt, **beside, return_tensors="pt")
        tokens = self.peft.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        return str(self.processor.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    root = tmp_path_factory.mktemp("mixed")
    base, words = made(KIND), processor()
    base.generation_config = hf.GenerationConfig(pad_token_id=1, eos_token_id=2)
    for part in (base, words):
        part.save_pretrained(root / "base")
    want = saved(KIND, root / "adapter")
    want.get_base_model().generation_config = base.generation_config
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode", image_size=SIZE)
    picture(root / "a.png", 1)
    write(root / "b.wav", 0.08, 2, 22_050)
    return Mixed(want, words, root)


@pytest.mark.parametrize("prompt", ["w5 w6", f"w5 {SOUND} w6 {IMAGE} w7"])
def test_a_prompt_has_an_image_and_a_sound_or_either_or_none(mixed: Mixed, peftfx: Run, prompt: str) -> None:
    """Without tokens of them, the image and then the sound come before the prompt."""
    image, sound = mixed.root / "a.png", mixed.root / "b.wav"
    seen = {"images": [read_image(image).resize(SIZE[::-1])]}
    heard = {"audio": [resample(*read_wav(sound), RATE).numpy()]}
    cases = {
        (IMAGE, SOUND): ({**seen, **heard}, ("--image", image, "--audio", sound)),
        (IMAGE,): (seen, ("--image", image)),
        (SOUND,): (heard, ("--audio", sound)),
        (): ({}, ()),
    }
    said = set()
    for tokens, (beside, flags) in cases.items():
        text = prompt
        for token in {IMAGE, SOUND} - {*tokens}:
            text = text.replace(f"{token} ", "")
        result = peftfx("run", mixed.root / "out", *flags, "-p", text, "--max-new-tokens", NEW, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        whole = text if all(token in text for token in tokens) else "".join(tokens) + text
        assert found["text"] == mixed.says(whole, **beside), tokens
        assert found.get("images", []) == [str(image)] * (IMAGE in tokens)
        assert found.get("audio", []) == [str(sound)] * (SOUND in tokens)
        said.add(found["text"])
    assert len(said) > 2


def test_the_chat_template_places_both(mixed: Mixed, peftfx: Run) -> None:
    image, sound = mixed.root / "a.png", mixed.root / "b.wav"
    beside = {"images": [read_image(image).resize(SIZE[::-1])], "audio": [resample(*read_wav(sound), RATE).numpy()]}
    flags = ("--image", image, "--audio", sound, "-p", "w5", "--chat", "--max-new-tokens", NEW)
    assert peftfx("run", mixed.root / "out", *flags).out.strip() == mixed.says(f"w9 {IMAGE} {SOUND} w5", **beside)


def test_an_image_beside_a_sound_is_refused_where_no_graph_reads_it(mixed: Mixed, peftfx: Run) -> None:
    flags = ("--image", mixed.root / "a.png", "--audio", mixed.root / "b.wav")
    assert_refused(peftfx("run", mixed.root / "out", *flags), "pass --prompt")
    assert_refused(peftfx("run", mixed.root / "out", *flags[2:]), "sounds that are in a prompt", "pass --prompt")
    video = peftfx("run", mixed.root / "out", *flags[2:], "--video", mixed.root, "-p", "w5")
    assert_refused(video, "videos go with a prompt")
