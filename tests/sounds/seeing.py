"""Tiny models that read images and sounds in one text, and calls with any number of both in each row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from every_model.checks import build
from support.adapted import randomise
from support.decoding import left_padded
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.sounds.in_forward import sound_encoder

TASK, SIZE = "image-text-to-text", (64, 64)
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = ("gemma4_unified", "gemma4", "gemma3n", "nemotron_h_omni", "muse_spark")
LONGEST = 96  #: frames, or tokens of samples, of the longest recording of a call

Part = tuple[str, int, int] | int  #: an image with a seed, or a sound with a length and a seed; or a token of text


def made(kind: str) -> nn.Module:
    """A tiny model, the same each time."""
    return build(TASK, kind)


def saved(kind: str, directory: Path, alpha: int = 8, targets: str = "all-linear", **more: object) -> peft.PeftModel:
    """A model with an adapter, the same each time, in all layers but those that videos alone run."""
    names = [n for n, m in made(kind).named_modules() if isinstance(m, nn.Linear)]
    wanted = [n for n in names if "video" not in n and (targets == "all-linear" or targets in n)]
    torch.manual_seed(0)  # the starts of peft are random
    config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=wanted, **more)
    model = peft.get_peft_model(made(kind), config).eval()
    randomise(model)
    model.save_pretrained(str(directory))
    return model


def loaded(kind: str, directory: Path) -> peftfx.AdaptedModel:
    with pictures_of(SIZE):
        return peftfx.load(made(kind), directory)


def recordings(base: nn.Module, sounds: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Recordings of these lengths and seeds, as extractors make them: zeros behind the end, and masks."""
    frames = LONGEST * (8 if "input_values" in inspect.signature(base.forward).parameters else 1)
    name = "input_values" if frames > LONGEST else "input_features"
    width = () if frames > LONGEST else (_width(base),)
    values, masks = [], []
    for length, seed in sounds:
        mask = torch.arange(frames) < length * frames // LONGEST
        random = torch.randn(frames, *width, generator=torch.Generator().manual_seed(seed))
        values.append(random * mask.view(-1, *[1] * len(width)))
        masks.append(mask)
    return {name: torch.stack(values), f"{name}_mask": torch.stack(masks)}


def _width(base: nn.Module) -> int:
    return getattr(base.config.audio_config, "audio_embed_dim", 16)


def pieces(base: nn.Module, length: int) -> int:
    """How many tokens stand for a sound of this length: as many as the model's own code writes for it."""
    encode = sound_encoder(base)
    assert encode is not None
    with torch.no_grad():
        found = encode(**recordings(base, [(length, 0)])).pooler_output
    return found.shape[:-1].numel()


def call(base: nn.Module, rows: Sequence[Sequence[Part]]) -> dict[str, Tensor]:
    """A call of texts padded on the left, with images and sounds in them, as processors make one."""
    image, sound = base.config.image_token_id, base.config.audio_token_id
    texts, seen, heard = [], dict[str, list[Tensor]](), list[tuple[int, int]]()
    for row in rows:
        text: list[int] = []
        for part in row:
            if isinstance(part, int):
                text.append(part)
            elif part[0] == "image":
                with pictures_of(SIZE):
                    example = example_inputs(base, sizes={"batch": 1, "sequence": 4}, seed=part[2])
                text += [image] * int((example["input_ids"] == image).sum())
                for name, value in example.items():
                    if name.startswith("pixel") or "image" in name:
                        seen.setdefault(name, []).append(value)
            else:
                text += [sound] * pieces(base, part[1])
                heard.append((part[1], part[2]))
        texts.append(text)
    given = left_padded(texts)
    ids = given["input_ids"]
    given |= {name: torch.cat(values) for name, values in seen.items()}
    if "mm_token_type_ids" in inspect.signature(base.forward).parameters:
        given["mm_token_type_ids"] = (ids == image).long() + 3 * (ids == sound).long()
    return given | (recordings(base, heard) if heard else {})
