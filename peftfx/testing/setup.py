"""Helpers of the laws: adapted models of the pool that a law may change, and comparisons of results."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Method
from peftfx.model.adapted import AdaptedModel
from peftfx.testing.cases import Case
from peftfx.testing.pool import captured

LOOSE = {"float32": 1e-4, "bfloat16": 0.1}  #: the largest error by dtype, relative to the largest output


def bare_case(case: Case, *, training: bool = False) -> AdaptedModel:
    """Return a model of the pool without adapters, as a copy that may be changed."""
    own, example = captured(case.spec, training=training).copy(), case.spec.inputs(2, 3)
    adapted = AdaptedModel.on(own.model, own.graph.sites, example)
    adapted.graphs.keep(own.graph, example)
    return adapted


def adapt(case: Case, *rules: Method, training: bool = False, stirred: bool = True) -> AdaptedModel:
    """Return a model of the pool with an adapter; if `stirred`, its parameters are moved off their initial values."""
    adapted = bare_case(case, training=training)
    adapted.add_adapter("default", rules, seed=case.seed)
    if stirred:
        stir(adapted.adapter("default"), case.seed)
    return adapted


def output(adapted: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a model's output tensor for a call, or the first one if the model returns several."""
    first = pytree.tree_leaves(adapted(**inputs))[0]
    assert isinstance(first, Tensor)
    return first


@torch.no_grad()
def stir(adapter: Adapter, seed: int) -> None:
    """Add to every trained tensor a random amount that depends on its name and the seed."""
    for name, p in adapter.named_parameters():
        rng = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        p.add_(torch.randn(p.shape, generator=rng).to(p.dtype), alpha=0.3)


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Assert that two tensors differ by at most `tolerance`, relative to the largest value."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{what}: {got.dtype}{list(got.shape)}"
    if not want.numel():
        return
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
    assert error <= tolerance, f"{what}: a relative error of {error:.2e}"


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a module, by name."""
    return {name: t.detach().clone() for name, t in nn.Module.state_dict(module).items()}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Assert that every tensor of a module is bit for bit the same as in `before`."""
    now = snapshot(module)
    assert now.keys() == before.keys()
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    assert not changed, f"changed: {changed}"
