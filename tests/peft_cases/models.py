"""Small models for HF PEFT's cases: their modules have the names that the cases target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Two linear layers, a dropout between them: `[batch, 10] -> [batch, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.drop = nn.Linear(10, 20), nn.Linear(20, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.drop(self.lin0(x).relu())).log_softmax(-1)


class Wider(Mlp):
    """The same with as many features as a butterfly of eight needs: `[batch, 10] -> [batch, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 32), nn.Linear(32, 2)


class Normed(nn.Module):
    """The same with layer norms in front of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layernorm0, self.layernorm1 = nn.LayerNorm(10), nn.LayerNorm(20)
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.layernorm1(self.lin0(self.layernorm0(x)).relu())).log_softmax(-1)


class TokensAndConv1D(nn.Module):
    """An embedding and transformers' Conv1D, whose weight is stored [in, out]: `[batch, length] -> [batch, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(10, 5), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1d(self.emb(x)).relu().mean(1)).log_softmax(-1)


class Conv(nn.Module):
    """A convolution of one to three dimensions, its mean over these, and a linear layer: `-> [batch, 2]`."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.name = f"conv{conv.weight.ndim - 2}d"
        self.add_module(self.name, conv)
        self.lin0 = nn.Linear(conv.weight.shape[0], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.get_submodule(self.name)(x).relu().flatten(2).mean(-1)).log_softmax(-1)


class Attention(nn.Module):
    """torch's MultiheadAttention of a sequence to itself, and a linear layer: `[length, batch, 10] -> [.., 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


class Product(nn.Module):
    """A linear layer that is no `nn.Linear`: its weight is stored [in, out]."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out)), nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Products(nn.Module):
    """The two linear layers as plain products: `[batch, 10] -> [batch, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = Product(10, 20), Product(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu()).log_softmax(-1)


@dataclass(frozen=True)
class Built:
    """How a model is made, and what it is called with.

    Attributes:
        sizes: shapes of the input: the first is captured, at the others it is compared.
        tokens: how many there are, where the input is of these.
    """

    make: Callable[[], nn.Module]
    sizes: tuple[tuple[int, ...], ...]
    tokens: int = 0

    def module(self) -> nn.Module:
        """A new one, every parameter off its start."""
        torch.manual_seed(11)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    def calls(self) -> list[dict[str, Tensor]]:
        """A call of each size."""
        rng = torch.Generator().manual_seed(3)
        if self.tokens:
            return [{"x": torch.randint(self.tokens, size, generator=rng)} for size in self.sizes]
        return [{"x": torch.randn(size, generator=rng)} for size in self.sizes]


ROWS = ((4, 10), (9, 10), (1, 10))
MODELS: Mapping[str, Built] = {
    "MLP": Built(Mlp, ROWS),
    "MLP of 32": Built(Wider, ROWS),
    "MLP with norms": Built(Normed, ROWS),
    "embedding and Conv1D": Built(TokensAndConv1D, ((2, 3), (5, 7), (1, 2)), tokens=100),
    "conv1d": Built(lambda: Conv(nn.Conv1d(3, 6, 2)), ((2, 3, 8), (5, 3, 11), (1, 3, 4))),
    "conv1d of 64 channels": Built(lambda: Conv(nn.Conv1d(64, 16, 2)), ((2, 64, 8), (5, 64, 11), (1, 64, 4))),
    "conv1d of 2 groups": Built(lambda: Conv(nn.Conv1d(8, 8, 3, groups=2)), ((2, 8, 8), (5, 8, 11), (1, 8, 4))),
    "conv2d of kernel 1": Built(lambda: Conv(nn.Conv2d(5, 10, 1)), ((2, 5, 7, 6), (4, 5, 9, 8), (1, 5, 4, 4))),
    "conv2d": Built(lambda: Conv(nn.Conv2d(5, 10, 3)), ((2, 5, 7, 6), (4, 5, 9, 8), (1, 5, 4, 4))),
    "conv2d of 8 channels": Built(lambda: Conv(nn.Conv2d(8, 32, 3)), ((2, 8, 7, 6), (4, 8, 9, 8), (1, 8, 4, 4))),
    "conv2d of 8 groups": Built(lambda: Conv(nn.Conv2d(16, 16, 3, groups=8)), ((2, 16, 7, 6), (4, 16, 9, 8))),
    "conv2d of 2 groups": Built(
        lambda: Conv(nn.Conv2d(16, 32, 3, padding=1, groups=2)), ((2, 16, 7, 6), (4, 16, 9, 8), (1, 16, 3, 4))
    ),
    "conv3d": Built(lambda: Conv(nn.Conv3d(5, 10, 3)), ((2, 5, 6, 7, 4), (3, 5, 8, 4, 9), (1, 5, 4, 4, 4))),
    "attention": Built(Attention, ((5, 2, 10), (9, 3, 10), (4, 1, 10))),
    "MLP of products": Built(Products, ROWS),
}
