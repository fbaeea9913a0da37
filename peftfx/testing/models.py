"""Models for the laws: small frozen specs whose repr reproduces them, and the plain torch modules that they build."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfx.testing.blocks import CHANNELS, WIDTH, BlockSpec

_WORDS = 11
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Spec(ABC):
    """The spec of a whole model: its blocks, and the dtype of its parameters."""

    blocks: tuple[BlockSpec, ...]
    dtype: Dtype = field(default="float32", kw_only=True)

    @abstractmethod
    def module(self) -> nn.Module:
        """Return a new module, whose parameters `build` has not moved off their initial values yet."""

    @abstractmethod
    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
        """Return the keyword arguments of a call."""

    def sizes(self) -> tuple[int, int] | None:
        """Return the batch and the sequence of a call if the model has inputs of only these sizes, else None."""
        return None

    def build(self) -> nn.Module:
        """Return the module in eval mode with all parameters moved off their initial values, so that no bias is 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.module()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(getattr(torch, self.dtype)).eval()


@dataclass(frozen=True)
class Text(Spec):
    """A text model: from token ids to scores of words."""

    tied: bool = False
    positions: bool = False

    def module(self) -> nn.Module:
        return _Text(self)

    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
        return {"ids": torch.randint(_WORDS, (batch, sequence), generator=torch.Generator().manual_seed(seed))}


class _Text(nn.Module):
    def __init__(self, spec: Text) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, WIDTH, padding_idx=1)
        self.places = nn.Embedding(16, WIDTH) if spec.positions else None
        self.blocks = nn.ModuleList(block.build() for block in spec.blocks)
        self.head = nn.Linear(WIDTH, _WORDS, bias=False)
        if spec.tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Image(Spec):
    """An image model: from an image to scores of classes; the image's height grows with `sequence`."""

    def module(self) -> nn.Module:
        return _Image(self)

    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
        shape = (batch, CHANNELS, 11 + sequence, 12)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return {"pixels": pixels.to(getattr(torch, self.dtype))}


class _Image(nn.Module):
    def __init__(self, spec: Image) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(block.build() for block in spec.blocks))
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels).mean((2, 3)))


@dataclass(frozen=True, eq=False)
class GivenModel(Spec):
    """A caller's model, with the arguments of one call; their first axis is the batch."""

    model: nn.Module = field(kw_only=True, repr=False)
    example: Mapping[str, Tensor] = field(kw_only=True, repr=False)

    __eq__, __hash__ = object.__eq__, object.__hash__  # by identity: captures are cached by spec

    def module(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def build(self) -> nn.Module:
        return self.module().eval()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print only the class in hypothesis's reports, because the caller has the model."""
        printer.text(f"<{type(self.model).__name__}, as it was given>")

    def sizes(self) -> tuple[int, int]:
        return len(next(iter(self.example.values()))), 1

    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
        return dict(self.example)


@dataclass(frozen=True)
class Causal(Spec):
    """A LLaMA of transformers: from token ids to scores of words, with a key/value cache."""

    layers: int = 1
    groups: int = 1

    def module(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=12,
            vocab_size=_WORDS,
            max_position_embeddings=64,
            num_attention_heads=2,
            num_key_value_heads=2 // self.groups,
            num_hidden_layers=self.layers,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def inputs(self, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
        ids = torch.randint(_WORDS, (batch, sequence), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
