"""Beside a text: arguments that say which of its tokens see an image, stand for one, or stand where on a page."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

CROSS_MASK = "cross_attention_mask"  #: which tokens attend to which tiles, [batch, sequence, images, tiles]
_IMAGE_MASK = "image_attention_mask"  #: which tokens attend to which images, [batch, sequence, images]
PLACES = "image_embeds_position_mask"  #: which tokens stand for a piece of an image, [batch, sequence]
BOXES = "bbox"  #: left, top, right and bottom of each token on a page, [batch, sequence, 4]
_PAGE = 1000  #: the edge of a page, as the processors of such models count
_TILED = 6  #: the axes of images in tiles: batch, images, tiles, channels, height, width


def has_image_axis(model: nn.Module, accepted: Collection[str]) -> bool:
    """Return whether a model's text attends to several images, so that pixels have an axis for these."""
    writes = getattr(model, "can_generate", None)
    return _IMAGE_MASK in accepted and writes is not None and bool(writes())


def image_masks(model: nn.Module, accepted: Collection[str], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks with which all tokens of a call attend to its images, but the first, which is before them."""
    pixels = made.get("pixel_values")
    if pixels is None:
        return {}
    found = {}
    if CROSS_MASK in accepted and pixels.ndim == _TILED:
        found[CROSS_MASK] = torch.ones(*made["input_ids"].shape, *pixels.shape[1:3], dtype=torch.long)
    if has_image_axis(model, accepted):
        found[_IMAGE_MASK] = torch.ones(*made["input_ids"].shape, pixels.shape[1], dtype=torch.long)
    for mask in found.values():
        mask[:, 0] = 0
    return found


def random_boxes(shape: tuple[int, ...], most: int, random: torch.Generator) -> Tensor:
    """Return random boxes of tokens on a page, int64[*shape, 4], in numbers below `most`."""
    corners = torch.randint(min(_PAGE, most), (*shape, 2, 2), generator=random)
    return corners.sort(dim=-2).values.flatten(-2)
