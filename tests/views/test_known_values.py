"""Known values: what a model's code reads of an image's sizes is a constant of its graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.graph.capturing.known_values import known_values

GRID = torch.tensor([[2, 3]])


class Looping(nn.Module):
    """Code that loops over the numbers of a grid, and drops empty rows of pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        with known_values([GRID], [pixels]) as known:
            full = (pixels == 0).sum(-1) != pixels.shape[-1]
            kept = pixels[full]
            parts = [kept[:h] * torch.arange(w)[:1].add(1) for h, w in GRID.tolist()]
        agreed = known.agreed()
        assert agreed is not None
        return torch.where(agreed, torch.cat(parts), torch.nan)


def test_the_code_loops_over_known_numbers_and_keeps_full_rows() -> None:
    graph = peftfx.capture(Looping(), {"pixels": torch.ones(3, 4)}, axes={"pixels": (None, None)})
    pixels = torch.randn(3, 4)
    assert torch.equal(graph.run(pixels)[0], pixels[:2])


def test_an_empty_row_gives_no_numbers_where_the_code_would_drop_it() -> None:
    graph = peftfx.capture(Looping(), {"pixels": torch.ones(3, 4)}, axes={"pixels": (None, None)})
    pixels = torch.randn(3, 4)
    pixels[1] = 0
    assert graph.run(pixels)[0].isnan().all()


class Writing(nn.Module):
    """Code that writes a computed value into a tensor of sizes."""

    def forward(self, pixels: Tensor) -> Tensor:
        with known_values([GRID]):
            sizes = GRID + 1
            sizes[0] = pixels[0, :2].long()
            return sizes


def test_a_write_of_what_is_not_known_is_refused() -> None:
    with pytest.raises(PeftfxError, match="writes a computed value into a tensor that holds the sizes of images"):
        peftfx.capture(Writing(), {"pixels": torch.ones(3, 4)}, axes={"pixels": (None, None)})


class Cutting(nn.Module):
    """Code that cuts and reshapes by numbers which are still in tensors."""

    def forward(self, pixels: Tensor) -> Tensor:
        with known_values([GRID]):
            for h, w in GRID:
                pixels = pixels[:h, : w - 1].split([h])[0].reshape(h, w - 1)
        return pixels


def test_known_tensors_are_bounds_and_sizes() -> None:
    graph = peftfx.capture(Cutting(), {"pixels": torch.ones(3, 4)}, axes={"pixels": (None, None)})
    pixels = torch.randn(3, 4)
    assert torch.equal(graph.run(pixels)[0], pixels[:2, :2])
