"""Prompts with sounds on the command line: token by token what transformers' processor and `peft` give."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from sounds.hearing import configured
from support.adapted import randomise
from support.command import Result, assert_refused
from support.words import word_tokenizer

from peftfx.export.command import export_directory
from peftfx.serving.sound import read_wav, resample

Run = Callable[..., Result]
RATE, NEW = 16_000, 6
TOKEN = "<sound>"
TEMPLATE = (
    "{% for m in messages %}USER {% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}<sound> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def processor() -> hf.AudioFlamingo3Processor:
    table = ["<unk>", "<pad>", "<eos>", "USER", *(f"w{i}" for i in range(92)), TOKEN]
    special = [TOKEN, "<pad>", "<eos>"]
    words = word_tokenizer(table, special, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=RATE)
    return hf.AudioFlamingo3Processor(extractor, words, chat_template=TEMPLATE, audio_token=TOKEN)


def write(path: Path, seconds: float, seed: int, rate: int = RATE) -> Path:
    """A WAV file of noise."""
    samples = np.random.default_rng(seed).normal(size=int(seconds * rate)) * 6000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(samples.clip(-32768, 32767).astype("<i2").tobytes())
    return path


@dataclass
class Hearing:
    """A tiny model of text and sounds with a random LoRA, its processor, and what was exported of it."""

    peft: peft.PeftModel
    processor: Any
    root: Path
    directory: Path

    def says(self, prompt: str, path: Path) -> str:
        """What `peft` and transformers' processor continue the prompt with."""
        heard = resample(*read_wav(path), RATE).numpy()
        made = self.processor(text=prompt, audio=[heard], return_tensors="pt")
        tokens = self.peft.generate(**made, max_new_tokens=NEW, do_sample=False)
        return self.processor.tokenizer.decode(tokens[0, made["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Hearing:
    root = tmp_path_factory.mktemp("hearing")
    torch.manual_seed(1)
    config = configured(hf.AudioFlamingo3Config, "qwen2", "audioflamingo3_encoder")
    config.audio_config.max_source_positions = 50  # a second
    base = hf.AudioFlamingo3ForConditionalGeneration(config).eval()
    base.generation_config = hf.GenerationConfig(pad_token_id=1, eos_token_id=2)
    base.save_pretrained(root / "base")
    made = processor()
    made.save_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    for seed in (0, 1):
        write(root / f"{seed}.wav", 0.7 + seed, seed, RATE if seed else 22_050)
    return Hearing(model, made, root, root / "out")


def test_a_sound_and_a_prompt_are_continued_as_by_transformers(hearing: Hearing, peftfx: Run) -> None:
    """One recording is of another rate; the other is longer than a window, and so two rows of features."""
    said = []
    for seed in (0, 1):
        path = hearing.root / f"{seed}.wav"
        result = peftfx("run", hearing.directory, "--audio", path, "--prompt", "w5 w6 w7", "--max-new-tokens", NEW)
        assert result.code == 0, result.err
        said.append(result.out.strip())
        assert said[-1] == hearing.says(f"{TOKEN}w5 w6 w7", path)
    assert said[0] != said[1]  # the sound is heard


def test_the_sound_goes_where_the_prompt_has_its_token(hearing: Hearing, peftfx: Run) -> None:
    path, prompt = hearing.root / "0.wav", f"w5 {TOKEN} w6 w7"
    result = peftfx("run", hearing.directory, "--audio", path, "--prompt", prompt, "--max-new-tokens", NEW, "--json")
    found = json.loads(result.out)
    assert found == {"prompt": prompt, "audio": [str(path)], "text": hearing.says(prompt, path)}


def test_the_chat_template_places_the_sound(hearing: Hearing, peftfx: Run) -> None:
    path = hearing.root / "1.wav"
    result = peftfx("run", hearing.directory, "--audio", path, "-p", "w5", "--chat", "--max-new-tokens", NEW)
    assert result.out.strip() == hearing.says(f"USER {TOKEN} w5", path)


def test_what_does_not_fit_is_refused(hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
    path = hearing.root / "0.wav"
    assert_refused(peftfx("run", hearing.directory, "--audio", path), "pass --prompt too")
    two = peftfx("run", hearing.directory, "--audio", path, "--audio", path, "--prompt", f"w1 {TOKEN}")
    assert_refused(two, "the processor does not take these sounds")
    idle = peftfx("run", hearing.directory, "--audio", path, "--prompt", "w1", "--timestamps")
    assert_refused(idle, "--timestamps has no effect here: this run writes a text about sounds")
    both = peftfx("run", hearing.directory, "--audio", path, "--image", path, "--prompt", "w1")
    assert_refused(both, "this export has no graph of images that a prompt could have beside sounds")
    bare = tmp_path / "bare"
    shutil.copytree(hearing.directory, bare)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (bare / name).unlink(missing_ok=True)
    assert_refused(peftfx("run", bare, "--audio", path, "--prompt", "w1"), "processor")


def test_a_model_of_text_alone_has_no_graph_of_sounds(hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
    config = hf.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    export_directory(tmp_path / "base", tmp_path / "out", view="decode")
    path = hearing.root / "0.wav"
    refused = peftfx("run", tmp_path / "out", "--audio", path, "--prompt", "w1")
    assert_refused(refused, "this export has no graph of sounds that a prompt could have")
