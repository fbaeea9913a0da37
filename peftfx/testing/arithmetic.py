"""The laws of a method's arithmetic at one weight, without a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.contract.method import Base
from peftfx.contract.placement import site_tensors
from peftfx.contract.weight import WeightMethod, widened
from peftfx.errors import PeftfxError
from peftfx.passes.rewriting.site_op import bind
from peftfx.sites.site import Site
from peftfx.testing.cases import Case
from peftfx.testing.setup import adapt, assert_close


@torch.no_grad()
def fold(case: Case, method: WeightMethod) -> None:
    """`forward` on activations equals the operation on folded weights, at every kind of site and base; in float64."""
    if method.unfoldable:
        return
    adapted = adapt(case, method)
    nodes = {n.name: n for n in adapted.graph(adapted=False).nodes()}
    rng = torch.Generator().manual_seed(case.seed)
    for placement in adapted.adapter("default").placements.weights:
        site, own = placement.view, placement.method
        weight, bias = site_tensors(adapted.base, placement.site)
        weight, bias = weight.double(), None if bias is None else bias.double()
        base = placement.base(weight + torch.randn(weight.shape, generator=rng), bias)
        before = Base(base.weight.clone(), None if base.bias is None else base.bias.clone())
        own_p = adapted.adapter("default").params(placement)
        p = {name: t.double() if t.is_floating_point() else t for name, t in own_p.items()}
        x, op = input_of(case, site, rng), bind(nodes[placement.site.calls[0].op], placement.site)
        y = op(x, *base)
        want, got = op(x, *own.fold(site, base, p)), own.forward(site, op, x, y.clone(), base, p, False)
        assert_close(got, want, 1e-6, f"forward at {site.path}")
        assert torch.equal(base.weight, before.weight), "changed in place"
        if base.bias is not None and before.bias is not None:
            assert torch.equal(base.bias, before.bias), "changed in place"


@torch.no_grad()
def by_row(case: Case, method: WeightMethod) -> None:
    """Some rows of a weight, with those rows of the parameters in `by_row`, fold to the same rows of the whole."""
    if method.unfoldable:
        return
    adapted = adapt(case, method)
    for placement in adapted.adapter("default").placements.weights:
        own, site = placement.method, placement.view
        names = own.by_row(site)
        if names is None:
            continue
        weight, bias = site_tensors(adapted.base, placement.site)
        base = placement.base(weight.float(), None if bias is None else bias.float())
        under = Base(base.weight.flip(1) / 2, None if base.bias is None else base.bias + 1)
        p = widened(adapted.adapter("default").params(placement))
        for whole, folded in ((base, own.fold(site, base, p)), (under, own.fold_over(site, base, under, p))):
            for rows in (slice(0, 1), slice(len(base.weight) // 2, None)):
                some = {name: t[rows] if name in names else t for name, t in p.items()}
                start, now = _rows(base, rows), _rows(whole, rows)
                got = own.fold(site, now, some) if whole is base else own.fold_over(site, start, now, some)
                _assert_same(got, _rows(folded, rows), f"rows of the weight of {site.path}")


def _assert_same(got: Base, want: Base, what: str) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b, 1e-6, what)


def _rows(base: Base, rows: slice) -> Base:
    return Base(base.weight[rows], None if base.bias is None else base.bias[rows])


@torch.no_grad()
def update(case: Case, method: WeightMethod) -> None:
    """The scales and the low-rank sum of a method's `update`, if it has one, make the weight and bias of `fold`."""
    if type(method).update is WeightMethod.update:
        return  # optional
    adapted = adapt(case, method)
    for placement in adapted.adapter("default").placements.weights:
        if placement.site.kind != "linear":
            continue
        own, (weight, bias) = placement.method, site_tensors(adapted.base, placement.site)
        base = placement.base(weight.float(), None if bias is None else bias.float())
        p = widened(adapted.adapter("default").params(placement))
        try:
            told = own.update(placement.view, base, p)
        except PeftfxError:  # this adapter has no such update: its rank is the weight's, for example
            continue
        want = own.fold(placement.view, base, p)
        got = Base(told.apply(base.weight), base.bias if told.bias is None else told.bias)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert_close(a, b, 1e-4, f"the update at {placement.site.path}")


def input_of(case: Case, site: Site, rng: torch.Generator) -> Tensor:
    """Return a random input for a site of this shape, at a case's sizes."""
    if site.kind == "embedding":
        return torch.randint(site.shape[0], (case.batch, case.sequence), generator=rng)
    inner = site.shape[0 if site.transposed else 1]
    if site.kind == "linear":
        return torch.randn(case.batch, case.sequence, inner, generator=rng).double()
    space = (7, 8)[: len(site.shape) - 2]
    return torch.randn(case.batch, inner * site.groups, *space, generator=rng).double()
