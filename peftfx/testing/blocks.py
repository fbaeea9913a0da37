"""The blocks of the laws' models: frozen specs, and the plain torch modules that they build."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH = 8  #: the width of every value between the blocks of a text model
CHANNELS = 4  #: the channels of every value between the blocks of an image model


class BlockSpec(ABC):
    """The spec of a module from [batch, sequence, WIDTH] to the same shape, or from an image to an image."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a new module with torch's own initial values."""


@dataclass(frozen=True)
class DenseBlock(BlockSpec):
    """A linear layer, stored [in, out] like GPT-2's if `transposed`."""

    bias: bool = True
    transposed: bool = False
    inner: int = WIDTH
    outer: int = WIDTH

    def build(self) -> nn.Module:
        return Conv1D(self.outer, self.inner) if self.transposed else nn.Linear(self.inner, self.outer, self.bias)


@dataclass(frozen=True)
class ProductBlock(BlockSpec):
    """A linear layer written out with a bare parameter: `x @ W` or `x @ W.T`, and `+ b`."""

    turned: bool = True
    bias: bool = True

    def build(self) -> nn.Module:
        return _Product(self)


class _Product(nn.Module):
    def __init__(self, spec: ProductBlock) -> None:
        super().__init__()
        self.turned = spec.turned
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.bias = nn.Parameter(torch.zeros(WIDTH)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight.T if self.turned else self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Mlp(BlockSpec):
    """A feed-forward block with a separate gate, a fused gate, or no gate."""

    gate: Literal["none", "beside", "fused"] = "none"
    transposed: bool = False

    def build(self) -> nn.Module:
        return _Mlp(self)


class _Mlp(nn.Module):
    def __init__(self, spec: Mlp) -> None:
        super().__init__()
        self.fused = spec.gate == "fused"
        self.up = DenseBlock(transposed=spec.transposed, outer=24 if self.fused else 12).build()
        self.side = nn.Linear(WIDTH, 12, bias=False) if spec.gate == "beside" else None
        self.down = DenseBlock(transposed=spec.transposed, inner=12).build()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.fused:
            gate, up = up.chunk(2, -1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(up) if self.side is None else F.silu(self.side(x)) * up)


@dataclass(frozen=True)
class AttentionBlock(BlockSpec):
    """Self-attention, written out or by PyTorch's fused operator; projections separate, in thirds, or head by head."""

    style: Literal["softmax", "sdpa"] = "sdpa"
    layout: Literal["apart", "thirds", "heads"] = "apart"
    transposed: bool = False
    bias: bool = True
    dropout: float = 0.0

    def build(self) -> nn.Module:
        return _Attention(self)


class _Attention(nn.Module):
    def __init__(self, spec: AttentionBlock) -> None:
        super().__init__()
        self.spec = spec
        if spec.layout == "apart":
            self.q, self.k, self.v = (DenseBlock(spec.bias, spec.transposed).build() for _ in range(3))
        else:
            self.qkv = DenseBlock(spec.bias, spec.transposed, outer=3 * WIDTH).build()
        self.o = DenseBlock(spec.bias, spec.transposed).build()
        self.drop = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self._heads(x))
        if self.spec.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.spec.dropout if self.training else 0.0)
        else:
            y = self.drop((q @ k.transpose(-1, -2) / math.sqrt(WIDTH // 2)).softmax(-1)) @ v
        return self.o(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.spec.layout == "apart":
            return tuple(f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        if self.spec.layout == "thirds":
            return tuple(t.unflatten(-1, (2, -1)) for t in self.qkv(x).chunk(3, -1))
        return tuple(self.qkv(x).unflatten(-1, (2, 3, -1)).unbind(-2))


@dataclass(frozen=True)
class Mix(BlockSpec):
    """A convolution over the tokens."""

    groups: int = 1

    def build(self) -> nn.Module:
        return _Mix(self)


class _Mix(nn.Module):
    def __init__(self, spec: Mix) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=spec.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()  # GPT-2's Conv1D needs contiguous tensors


@dataclass(frozen=True)
class Conv(BlockSpec):
    """A convolution of an image."""

    stride: int = 1
    padding: int | str = 1
    dilation: int = 1
    groups: int = 1
    mode: Literal["zeros", "reflect"] = "zeros"
    bias: bool = True

    def build(self) -> nn.Module:
        sizes = (self.stride, self.padding, self.dilation, self.groups, self.bias, self.mode)
        return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, *sizes), nn.GELU())


@dataclass(frozen=True)
class Residual(BlockSpec):
    """A residual block: `x + drop(inner(norm(x)))`."""

    inner: BlockSpec
    norm: Literal["layer", "rms", "none"] = "layer"
    dropout: float = 0.0

    def build(self) -> nn.Module:
        return _Residual(self)


class _Residual(nn.Module):
    def __init__(self, spec: Residual) -> None:
        super().__init__()
        norms = {"layer": nn.LayerNorm(WIDTH), "rms": nn.RMSNorm(WIDTH, eps=1e-5), "none": nn.Identity()}
        self.norm, self.inner, self.drop = norms[spec.norm], spec.inner.build(), nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(self.norm(x)))


@dataclass(frozen=True)
class Norm(BlockSpec):
    """An RMS norm written by hand, `w * x` or Gemma's `(1 + w) * x`."""

    shifted: bool = False

    def build(self) -> nn.Module:
        return _Norm(self)


class _Norm(nn.Module):
    def __init__(self, spec: Norm) -> None:
        super().__init__()
        self.shifted = spec.shifted
        self.gain = nn.Parameter(torch.zeros(WIDTH) if spec.shifted else torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return ((1.0 + self.gain.float()).to(x.dtype) if self.shifted else self.gain) * normed


@dataclass(frozen=True)
class Branch(BlockSpec):
    """Two modules side by side, whose outputs are added."""

    left: BlockSpec
    right: BlockSpec

    def build(self) -> nn.Module:
        return _Branch(self)


class _Branch(nn.Module):
    def __init__(self, spec: Branch) -> None:
        super().__init__()
        self.left, self.right = spec.left.build(), spec.right.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + torch.tanh(self.right(x))


@dataclass(frozen=True)
class Twice(BlockSpec):
    """A module that is called twice, one call after the other."""

    inner: BlockSpec

    def build(self) -> nn.Module:
        return _Twice(self)


class _Twice(nn.Module):
    def __init__(self, spec: Twice) -> None:
        super().__init__()
        self.inner = spec.inner.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))
