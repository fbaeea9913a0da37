"""The pool of random models: specs sorted by size; each model is built and captured once per process."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from random import Random
from typing import Literal

from torch import nn

from peftfx.graph.graph import BASE, Graph
from peftfx.graph.linking import link
from peftfx.testing.blocks import (
    WIDTH,
    AttentionBlock,
    BlockSpec,
    Branch,
    Conv,
    DenseBlock,
    Mix,
    Mlp,
    Norm,
    ProductBlock,
    Residual,
    Twice,
)
from peftfx.testing.models import Causal, Dtype, Image, Spec, Text
from peftfx.views.capture import capture

#: A model for each kind of block, with few blocks: failing examples shrink to these.
_SMALL = (
    Text(()),
    Text((), tied=True, positions=True),
    Text((DenseBlock(),)),
    Text((DenseBlock(transposed=True),), dtype="bfloat16"),
    Text((ProductBlock(turned=True),)),
    Text((ProductBlock(turned=False, bias=False),)),
    Text((Twice(DenseBlock()),)),
    Text((Mix(groups=2),)),
    Text((Norm(), Norm(shifted=True))),
    Text((Mlp("fused"),)),
    Text((AttentionBlock("softmax", "heads", bias=False),)),
    Text((AttentionBlock("sdpa", "thirds", transposed=True),)),
    Text((AttentionBlock("softmax", "apart"), AttentionBlock("sdpa", "thirds", transposed=True))),
    Image((Conv(stride=2, groups=2),)),
    Image((Conv(padding="same", dilation=2, mode="reflect"),)),
    Image((Conv(padding="valid", bias=False), Conv(padding=0, groups=4)), dtype="bfloat16"),
)


_DTYPES: tuple[Dtype, ...] = ("float32", "float32", "bfloat16")
_STYLES: tuple[Literal["softmax", "sdpa"], ...] = ("softmax", "sdpa")
_LAYOUTS: tuple[Literal["apart", "thirds", "heads"], ...] = ("apart", "thirds", "heads")
_MODES: tuple[Literal["zeros", "reflect"], ...] = ("zeros", "reflect")


def random_block(random: Random, depth: int = 1) -> BlockSpec:
    """Return a random block of a text model; `depth` is how deeply blocks may contain blocks."""
    flag = lambda: random.random() < 0.5  # noqa: E731
    kinds = ("dense", "product", "mix", "mlp", "attention", *("residual", "branch", "twice") * (2 * depth))
    match random.choice(kinds):
        case "dense":
            return DenseBlock(bias=flag(), transposed=flag())
        case "product":
            return ProductBlock(turned=flag(), bias=flag())
        case "mix":
            return Mix(groups=random.choice((1, 2, WIDTH)))
        case "mlp":
            return Mlp(random.choice(("none", "beside", "fused")), transposed=flag())
        case "attention":
            style, layout = random.choice(_STYLES), random.choice(_LAYOUTS)
            return AttentionBlock(style, layout, flag(), flag(), random.choice((0.0, 0.2)))
        case "residual":
            return Residual(random_block(random, depth - 1), random.choice(("layer", "rms")), random.choice((0.0, 0.2)))
        case "branch":
            return Branch(random_block(random, depth - 1), random_block(random, depth - 1))
        case _:
            return Twice(random_block(random, depth - 1))


def random_conv(random: Random) -> BlockSpec:
    """Return a random block of an image model."""
    padding = random.choice((0, 1, 2, "same", "valid"))
    stride = 1 if padding == "same" else random.choice((1, 2))
    mode = random.choice(_MODES)
    return Conv(stride, padding, random.choice((1, 2)), random.choice((1, 2, 4)), mode, random.random() < 0.5)


def random_spec(seed: int) -> Spec:
    """Return the spec of a random model."""
    random = Random(seed)
    dtype: Dtype = random.choice(_DTYPES)
    if random.random() < 0.3:
        return Image((random_conv(random), random_conv(random)), dtype=dtype)
    blocks = tuple(random_block(random) for _ in range(random.choice((2, 3))))
    return Text(blocks, tied=random.random() < 0.5, positions=random.random() < 0.5, dtype=dtype)


#: The models for soft prompts: causal models with a key/value cache, because prefixes need one.
PROMPTED: tuple[Spec, ...] = (Causal(()), Causal((), layers=2, groups=2))

POOL: tuple[Spec, ...] = tuple(
    sorted({*_SMALL, *map(random_spec, range(8))}, key=lambda spec: (len(repr(spec)), repr(spec)))
)


@dataclass(frozen=True)
class Captured:
    """A model and its graph. Both are shared, and must not be changed."""

    model: nn.Module
    graph: Graph

    def copy(self) -> Captured:
        """Return a copy that may be changed: with its own parameters and the same structure."""
        model, graph = copy.deepcopy(self.model), self.graph.clone()
        graph.module = link(graph.module.graph, {**dict(graph.module.named_children()), BASE: model})
        return Captured(model, graph)


@functools.cache
def captured(spec: Spec, *, training: bool = False) -> Captured:
    """Return the model of a spec and its graph, in eval or in train mode; cached."""
    model = spec.build().train(training)
    return Captured(model, capture(model, spec.inputs(2, 3)))
