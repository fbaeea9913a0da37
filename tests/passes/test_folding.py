"""Large weights of 16 bits are folded some rows at a time, and give the very bits of a fold of the whole weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.adapters import recipes
from peftfx.adapters.recipes import Folding, RecipeStep
from peftfx.contract.weight import WeightMethod
from peftfx.method import Base
from peftfx.methods import methods
from peftfx.sites.site import WeightSite

OUT, IN = 1003, 257  #: more numbers than are folded at a time, and no multiple of the rows that are
HALVES = (torch.float16, torch.bfloat16)
BY_ROW = {
    "LoRA": peftfx.LoRA(r=4),
    "DoRA": peftfx.LoRA(r=4, use_dora=True, lora_bias=True),
    "PiSSA": peftfx.LoRA(r=4, init_lora_weights="pissa"),
    "AdaLoRA": peftfx.AdaLoRA(init_r=4),
    "IA3": peftfx.IA3(),
    "IA3 on the input": peftfx.IA3(feedforward_modules=".*"),
    "HiRA": peftfx.HiRA(r=4),
}


def _site(bias: bool = True) -> WeightSite:
    own = "base.m.bias" if bias else None
    return WeightSite("m", "linear", "mlp", 0, "base.m.weight", own, (OUT, IN), False, (), ())


def _folding(*methods: WeightMethod, dtype: torch.dtype, bias: bool = True) -> tuple[Folding, dict[str, Tensor]]:
    rng, site = torch.Generator().manual_seed(3), _site(bias)
    held = {"base.m.weight": torch.randn(OUT, IN, generator=rng).to(dtype)}
    if bias:
        held["base.m.bias"] = torch.randn(OUT, generator=rng).to(dtype)
    steps = []
    for number, method in enumerate(methods):
        made = method.init(site, Base(held["base.m.weight"].float(), held.get("base.m.bias")), rng)
        held |= {f"{number}.{n}": t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in made.items()}
        steps.append(RecipeStep(method, site, None, {n: f"{number}.{n}" for n in made}))
    return Folding(site, site.weight, site.bias, tuple(steps)), held


def _same(folding: Folding, held: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    fold = RecipeStep.fold

    def counted(*args: object) -> Base:
        nonlocal calls
        calls += 1
        return fold(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(RecipeStep, "fold", counted)
    (weight, bias), rounding = folding.measure(held.__getitem__)
    assert calls > len(folding.steps), "the weight was folded at once"
    monkeypatch.setattr(recipes, "_AT_ONCE", 1 << 40)
    calls = 0
    (whole, whole_bias), whole_rounding = folding.measure(held.__getitem__)
    assert calls == len(folding.steps)
    assert weight.dtype == whole.dtype == held["base.m.weight"].dtype
    assert torch.equal(weight, whole)
    assert not torch.equal(weight, held["base.m.weight"])
    assert rounding == whole_rounding
    assert 0 < rounding.max_rel < 0.01
    assert (bias is None) == (whole_bias is None)
    if bias is not None and whole_bias is not None:
        assert torch.equal(bias, whole_bias)
        assert (bias is held.get("base.m.bias")) == (whole_bias is held.get("base.m.bias"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", BY_ROW.values(), ids=BY_ROW)
def test_rows_fold_to_the_bits_of_the_whole(
    method: WeightMethod, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _same(*_folding(method, dtype=dtype), monkeypatch)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_several_adapters_fold_over_each_other_by_rows(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _same(*_folding(*BY_ROW.values(), dtype=torch.float16, bias=bias), monkeypatch)


def test_every_method_that_folds_by_rows_is_tested_here() -> None:
    by_row = {cls for cls in methods().values() if getattr(cls, "by_row", None) is not WeightMethod.by_row}
    assert {type(method) for method in BY_ROW.values()} == {cls for cls in by_row if issubclass(cls, WeightMethod)}


def test_a_method_of_another_kind_folds_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    folding, held = _folding(peftfx.LoRA(r=4), peftfx.OFT(oft_block_size=0, r=257), dtype=torch.float16)
    assert folding.steps[1].by_row is None
    new, _ = folding.measure(held.__getitem__)
    monkeypatch.setattr(recipes, "_AT_ONCE", 1)
    again, _ = folding.measure(held.__getitem__)
    assert torch.equal(new.weight, again.weight)


def test_a_value_that_is_not_finite_stays_so() -> None:
    folding, held = _folding(peftfx.LoRA(r=4), dtype=torch.float16)
    held["base.m.weight"][700, 3] = math.inf
    assert not folding.evaluate(held.__getitem__).weight.isfinite().all()
