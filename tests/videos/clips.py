"""Tiny models of text, images and videos, and calls whose videos have any number of frames."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise
from support.decoding import left_padded
from torch import Tensor, nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.videos import video_of

TASK, SIZE = "image-text-to-text", (64, 64)
GRID = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 64}}
#: The processors of types whose code reads how many slices a video has. Others take plain frames.
PROCESSORS: Mapping[str, Any] = {
    "qwen2_vl": hf.Qwen2VLVideoProcessor,
    "qwen2_5_vl": hf.Qwen2VLVideoProcessor,
    "qwen3_vl": hf.Qwen3VLVideoProcessor,
}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

Part = tuple[str, int, int] | int  #: a video of so many frames, or an image, each with a seed; or a token of text


def made(kind: str, root: Path) -> nn.Module:
    """A tiny model with processors of its own in a folder."""
    base = build(TASK, kind)
    home = root / "home"
    if not home.exists():
        shutil.copytree(base.config.name_or_path, home)
        if kind in PROCESSORS:
            PROCESSORS[kind](**GRID).save_pretrained(home)
    base.config.name_or_path = str(home)
    return base


def saved(kind: str, root: Path, name: str = "adapter", alpha: int = 8) -> peft.PeftModel:
    options = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules="all-linear")
    model = peft.get_peft_model(made(kind, root), options).eval()
    randomise(model)
    model.save_pretrained(str(root / name))
    return model


def tokens_of(config: Any) -> tuple[int, int]:
    """The tokens of an image's and of a video's pieces."""
    names = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))
    image, video = (next(getattr(config, name) for name in own if hasattr(config, name)) for own in names)
    return image, video


def call(base: nn.Module, rows: Sequence[Sequence[Part]]) -> dict[str, Tensor]:
    """A call of texts padded on the left, with images and videos in them, as processors make one."""
    image, video = tokens_of(base.config)
    texts, given = [], dict[str, list[Tensor]]()
    for row in rows:
        text: list[int] = []
        for part in row:
            if isinstance(part, int):
                text.append(part)
                continue
            what, count, seed = part
            if what == "video":
                one = video_of(base, count, SIZE, seed)
                with torch.no_grad():
                    found = base.base_model.get_video_features(**one, return_dict=True).pooler_output
                pieces = sum(value.shape[:-1].numel() for value in found)
                slices = int(one["video_grid_thw"][0, 0]) if base.config.model_type == "qwen3_vl" else 1
                for _ in range(slices):  # a time before each slice
                    text += [11, *[video] * (pieces // slices)]
            else:
                with pictures_of(SIZE):
                    example = example_inputs(base, sizes={"batch": 1, "sequence": 4}, seed=seed)
                text += [image] * int((example["input_ids"] == image).sum())
                one = {n: v for n, v in example.items() if n.startswith("pixel") or "image" in n}
            for name, value in one.items():
                given.setdefault(name, []).append(value)
        texts.append(text)
    made = left_padded(texts)
    ids = made["input_ids"]
    made |= {name: torch.cat(values) for name, values in given.items()}
    if "mm_token_type_ids" in inspect.signature(base.forward).parameters:
        made["mm_token_type_ids"] = (ids == image).long() + 2 * (ids == video).long()
    if base.config.model_type == "qwen2_5_vl" and "video_grid_thw" in made:
        made["second_per_grid_ts"] = torch.arange(len(made["video_grid_thw"])) + 0.5
    return made
