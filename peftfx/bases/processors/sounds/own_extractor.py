"""What a base's own feature extractor makes of a recording: its names, its shapes, and the dtypes of its masks.

The extractor is looked for where the model was loaded from.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.processors.image_size import processor_file
from peftfx.bases.processors.sounds.recordings import RECORDINGS

_RATE = 16_000  #: samples of a second, where an extractor tells no rate


def extracted(model: nn.Module, accepted: Collection[str]) -> dict[str, Tensor] | None:
    """Return what the model's own extractor makes of one recording of a second, by the names of a forward's arguments.

    Args:
        model: a model of transformers.
        accepted: the arguments of its forward.

    Returns:
        A recording of NaN and its masks, all true, each with a first axis of one sound; None if there is no extractor,
        or the forward takes nothing that it makes.
    """
    file = processor_file(model)
    made = {} if file is None else _made(file.parent, file.stat().st_mtime_ns)
    found = {name: value for name, value in made.items() if name in accepted}
    masked = all(name in RECORDINGS or (name.endswith("mask") and value.ndim == 2) for name, value in found.items())
    if not masked or sum(name in RECORDINGS for name in found) != 1:
        return None
    return {name: torch.full_like(v, torch.nan) if name in RECORDINGS else v for name, v in found.items()}


@functools.lru_cache(8)
def _made(home: Path, changed: int) -> Mapping[str, Tensor]:
    extractor = _extractor(home)
    if extractor is None:
        return {}
    rate = getattr(extractor, "sampling_rate", _RATE)
    with _disable_current_modes(), torch.device("cpu"):
        noise = torch.randn(rate, generator=torch.Generator().manual_seed(0)).numpy()
        try:
            made = extractor([noise], sampling_rate=rate, return_tensors="pt")
        except Exception:  # whatever an extractor raises for a recording that it does not take
            return {}
        found = {name: value for name, value in made.items() if isinstance(value, Tensor) and value.ndim > 1}
        return {n: v.float() if n in RECORDINGS else torch.ones_like(v) for n, v in found.items()}


def _extractor(home: Path) -> Any:
    """Load the feature extractor in a directory; None if it cannot be loaded, or reads no sounds."""
    from transformers import AutoFeatureExtractor, SequenceFeatureExtractor

    try:
        found = AutoFeatureExtractor.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    except Exception:  # a broken file, or one of images alone
        return None
    return found if isinstance(found, SequenceFeatureExtractor) else None
