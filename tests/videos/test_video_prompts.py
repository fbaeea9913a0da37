"""`peftfx run --video` continues a prompt with a video, whose frames are images in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from support.command import Result
from support.words import word_tokenizer
from videos.clips import SIZE, made, saved, tokens_of

from peftfx.export.command import export_directory

pytestmark = pytest.mark.further

Run = Callable[..., Result]
NEW = 6


WORDS = {"qwen2_vl": hf.Qwen2VLProcessor, "qwen2_5_vl": hf.Qwen2_5_VLProcessor}


def processor(kind: str, home: Path, image: int, video: int, vocabulary: int) -> hf.ProcessorMixin:
    names = {image: "<|image_pad|>", video: "<|video_pad|>", 0: "<unk>", 1: "<pad>", 2: "<eos>"}
    table = {names.get(i, f"w{i}"): i for i in range(vocabulary)}
    words = word_tokenizer(table, names.values(), unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    pictures = hf.AutoImageProcessor.from_pretrained(home, local_files_only=True)
    videos = hf.AutoVideoProcessor.from_pretrained(home, local_files_only=True)
    return WORDS[kind](image_processor=pictures, tokenizer=words, video_processor=videos)


def frames_in(folder: Path, count: int) -> np.ndarray:
    """Random frames, larger than those of the export, and what the command makes of them."""
    folder.mkdir()
    for number in range(count):
        pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((90, 70)).save(folder / f"{number:03}.png")
    paths = sorted(folder.iterdir())
    return np.stack([np.asarray(Image.open(path).resize((SIZE[1], SIZE[0]))) for path in paths])


@pytest.mark.parametrize("kind", WORDS)
def test_the_command_answers_a_prompt_about_a_video(kind: str, tmp_path: Path, peftfx: Run) -> None:
    """The processor of Qwen 2.5 VL tells how long a slice of a video lasts, too."""
    plain = made(kind, tmp_path)
    image, video = tokens_of(plain.config)
    words = processor(kind, tmp_path / "home", image, video, plain.config.get_text_config().vocab_size)
    plain.generation_config = hf.GenerationConfig(pad_token_id=1, eos_token_id=None)
    for part in (plain, words):
        part.save_pretrained(tmp_path / "base")
    want = saved(kind, tmp_path)
    options = {"adapter": tmp_path / "adapter", "view": "decode", "image_size": SIZE}
    export_directory(tmp_path / "base", tmp_path / "out", videos=True, **options)
    clip = frames_in(tmp_path / "clip", 6)
    given = words(text="<|video_pad|>w7 w8", videos=[clip], do_sample_frames=False, return_tensors="pt")
    assert given["video_grid_thw"].tolist() == [[3, 8, 8]]
    tokens = want.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=1, eos_token_id=None)
    said = words.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    for prompt in ("w7 w8", "<|video_pad|>w7 w8"):
        asked = ("--video", tmp_path / "clip", "-p", prompt, "--json", "--max-new-tokens", NEW)
        result = peftfx("run", tmp_path / "out", *asked)
        assert result.code == 0, result.err
        assert json.loads(result.out)["text"] == said
    (tmp_path / "empty").mkdir()
    for folder, what in ((tmp_path / "empty", "no images"), (tmp_path / "clip.mp4", "a video is a folder")):
        result = peftfx("run", tmp_path / "out", "--video", folder, "-p", "w7")
        assert result.code == 2
        assert what in result.err
    result = peftfx("run", tmp_path / "out", "--video", tmp_path / "clip")
    assert result.code == 2
    assert "videos go with a prompt" in result.err
