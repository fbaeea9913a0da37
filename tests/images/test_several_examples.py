"""A program of one example, run for several at once, gives for each what it gives for it alone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftfx
from peftfx import PeftfxError
from peftfx.graph.batching.run import run_for_several
from peftfx.graph.graph import Graph

TABLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([2, 0, 1])
IMAGE = (2, 3, 6, 4)  #: of one example: two tiles, of three channels

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elements of other shapes": lambda x: x[0] * TABLE + x.sum(0) / x.abs().mean((0, 2), keepdim=True)[0] - 1,
    "axes by number": lambda x: x.transpose(0, 2).permute(3, 0, 1, 2).flip(0).cumsum(1).unsqueeze(0).sum(-1),
    "axes from the end": lambda x: x.transpose(-1, -2).softmax(-1).unsqueeze(-3).flatten(-2),
    "parts": lambda x: torch.cat([*x.chunk(3, 1)[1:], *x.split([1, 2], dim=1)[:1]], 1)[:, :, 1:5:2].unbind(0)[1],
    "stacks with shared values": lambda x: torch.stack([x[0, 0], TABLE, x[1, 2]], 1),
    "shapes": lambda x: x.reshape(6, -1).view(2, 3, 24).squeeze(0).flatten(1).expand(3, 2, 72).repeat(2, 1, 1),
    "everything": lambda x: x.sum() + x.mean() * x.amax() + (x > 9).any() + (x < 9).all().float(),
    "the largest along an axis": lambda x: x.max(1)[0][:, None] + x.min(dim=-1, keepdim=True).values + x.std(),
    "products": lambda x: x @ TABLE.T + (x @ x.transpose(-1, -2)) + torch.bmm(x[0], x[1].transpose(1, 2)),
    "a product and a vector": lambda x: torch.addmm(TABLE[0], x[0, 0], TABLE[:4]),
    "convolutions": lambda x: functional.conv2d(x, TABLE[:3, :3].reshape(3, 3, 1, 1)),
    "a convolution of one row": lambda x: functional.conv2d(x[0], TABLE[:3, :3].reshape(3, 3, 1, 1), padding="same"),
    "resizing": lambda x: functional.interpolate(x, size=(3, 8), mode="bilinear"),
    "pooling": lambda x: functional.adaptive_avg_pool2d(x, (2, 2)),
    "unfolding": lambda x: functional.unfold(x, 2) + x.unfold(2, 2, 2).sum(),
    "sampling": lambda x: functional.grid_sample(
        x, (x[:, 0, :3, :2]).reshape(2, 3, 1, 2).sigmoid(), align_corners=True
    ),
    "attention": lambda x: functional.scaled_dot_product_attention(
        x, x + 1, x * 2, attn_mask=torch.ones(6, 6).tril() > 0
    ),
    "attention of a shared query": lambda x: functional.scaled_dot_product_attention(TABLE.expand(2, 3, 6, 4), x, x),
    "attention without rows": lambda x: functional.scaled_dot_product_attention(x[0], x[0], x[1], is_causal=True),
    "attention with a mask of each": lambda x: functional.scaled_dot_product_attention(x, x, x, x @ x.transpose(2, 3)),
    "norms": lambda x: functional.layer_norm(x, (6, 4)) + functional.rms_norm(x, (4,)),
    "sums by letters": lambda x: torch.einsum("nchw,hw->nhc", x, TABLE) + torch.einsum("chw,nchw->nhc", x[0], x),
    "norms of channels": lambda x: (
        functional.group_norm(x, 3)
        + functional.batch_norm(functional.group_norm(x[0], 2), TABLE[:, 0], TABLE[:, 1].abs())[:2, :3, None]
    ),
    "shared indices": lambda x: x[:, ROWS] + x[:, :, ROWS][:, :, :1] + x.index_select(1, ROWS),
    "indices of each": lambda x: TABLE[x[0, 0, 0].abs().long() % 6] + x[0, 0][x[0, 1, :4, 0].abs().long() % 6],
    "embedding": lambda x: functional.embedding(x[0].abs().long() % 6, TABLE),
    "writing into what is shared": lambda x: TABLE.clone().index_put_((ROWS,), x[0, 0, :3]),
    "adding rows to what is shared": lambda x: x.new_zeros(3, 4).index_add_(0, ROWS, x[0, 0, :3]),
    "casts and choices": lambda x: torch.where(x > 0, x, 0.5).to(torch.float64).type_as(TABLE).masked_fill(x > 2, 1),
}


class Runs(nn.Module):
    """A module that runs a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def captured(function: Callable[[Tensor], Tensor]) -> Graph:
    return peftfx.capture(Runs(function).eval(), {"x": torch.randn(IMAGE)}, axes={"x": (None,) * 4})


def run(graph: Graph, several: Tensor) -> Tensor:
    def read(target: str) -> Tensor:
        found: Tensor = operator.attrgetter(target)(graph.module)
        return found

    (found,) = run_for_several(graph.module, {"x": several}, read)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_each_of_several_gets_what_it_gets_alone(name: str, count: int) -> None:
    several = torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(count))
    want = torch.stack([FUNCTIONS[name](one) for one in several])
    torch.testing.assert_close(run(captured(FUNCTIONS[name]), several), want)


@pytest.mark.parametrize(
    ("function", "operator_"),
    [
        (lambda x: torch.roll(x, 1), "roll"),
        (lambda x: functional.conv2d(x, x[:1]), "conv2d"),
        (lambda x: functional.group_norm(x, 3, x[0, :, 0, 0]), "group_norm"),
        (lambda x: functional.instance_norm(x), "instance_norm"),
        (lambda x: torch.einsum("n...,n...->n", x, x), "einsum"),
    ],
    ids=["rolls over all axes", "weights of each", "a scale of each", "no rule", "axes without letters"],
)
def test_an_operator_without_a_way_is_refused(function: Callable[[Tensor], Tensor], operator_: str) -> None:
    with pytest.raises(PeftfxError, match=f"{operator_}.* cannot be run for several images"):
        run(captured(function), torch.randn(2, *IMAGE))


def test_what_other_code_reads_is_not_written_for_each() -> None:
    def function(x: Tensor) -> Tensor:
        shared = TABLE.clone()
        first = shared[:3]
        shared.index_put_((ROWS,), x[0, 0, :3])
        return first + shared[3:]

    with pytest.raises(PeftfxError, match="index_put_"):
        run(captured(function), torch.randn(2, *IMAGE))
