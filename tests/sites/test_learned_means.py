"""What looks like an attention or a layer, and is none: learned means of earlier outputs, and codebooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peftfx
from peftfx.views.capture import capture


class MeanOfBlocks(nn.Module):
    """Each block, and the head, reads a mean of all outputs before it, weighted by a parameter's softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.queries = nn.LayerNorm(8), nn.ParameterList(torch.randn(1, 8) for _ in range(2))

    def mean(self, query: Tensor, blocks: list[Tensor]) -> Tensor:
        stack = torch.stack(blocks, -2)
        return (((query * 2) @ self.norm(stack).transpose(-1, -2)).softmax(-1) @ stack).squeeze(-2)

    def forward(self, x: Tensor) -> Tensor:
        blocks = [x + self.first(x)]
        blocks.append(self.second(self.mean(self.queries[0], [*blocks, x * 2])))
        return self.head(self.norm(self.mean(self.queries[1], blocks)))


class Pooled(nn.Module):
    """A learned query that reads projected keys and values: an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.o, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.query = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.o((self.query @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)).relu())


class Coded(nn.Module):
    """The nearest row of a codebook, and a layer that reads its number; or that reads the distances too."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.inner, self.codes, self.read = nn.Linear(8, 8), nn.Embedding(6, 8), read
        self.table, self.out = nn.Embedding(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        near = 2 * self.inner(x) @ self.codes.weight.t() - (self.codes.weight**2).sum(-1)
        found = self.out(self.table(near.argmax(-1)))
        return found * near.sum() if self.read else found


def roles_of(model: nn.Module) -> dict[str, str]:
    return {site.path: site.role for site in capture(model.eval(), {"x": torch.randn(2, 5, 8)}).sites}


def test_a_learned_mean_of_earlier_outputs_is_no_attention() -> None:
    roles = roles_of(MeanOfBlocks())
    assert (roles["first"], roles["second"], roles["head"]) == ("linear", "linear", "head")


def test_a_learned_query_of_projected_values_is_an_attention() -> None:
    roles = roles_of(Pooled())
    assert (roles["k"], roles["v"], roles["o"]) == ("attention.key", "attention.value", "attention.output")


def test_a_codebook_that_only_chooses_a_row_is_no_place() -> None:
    assert "codes" not in roles_of(Coded(read=False))
    rule = peftfx.LoRA(r=2, target="all-linear | head")
    adapted = peftfx.transform(Coded(read=False), rule, inputs={"x": torch.randn(2, 5, 8)})
    assert {site.path for site in adapted.sites.weights if site.kind == "linear"} == {"inner", "out"}


def test_a_codebook_whose_distances_are_read_is_a_place() -> None:
    assert "codes" in roles_of(Coded(read=True))
