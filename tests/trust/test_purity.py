"""Purity: what tells changes nothing, and what changes something for a while puts it back, whatever happens inside."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tqdm
import transformers as hf
from support.zoo import ZOO

import peftfx
from peftfx.cli.speech import quiet
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.reports.facts import add_merged, add_rounding, tell_rounding
from peftfx.export.reports.report import Report
from peftfx.export.slots.batched import Batched
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.merge import Merge


@pytest.fixture
def adapted() -> AdaptedModel:
    """Two adapters, of which the first acts, and a part of it is frozen by its user."""
    made = peftfx.transform(ZOO["bert"].build(), "lora(r=2)@attention.query", "low", seed=0)
    made.add_adapter("other", "ia3@mlp.down", seed=0)
    made.set_adapter("low")
    next(made.adapter("low").parameters()).requires_grad_(False)
    return made


def state(model: AdaptedModel) -> object:
    """What a user can see of which adapters act and what is trained."""
    modes = {name: module.training for name, module in model.named_modules()}
    return model.active, {name: p.requires_grad for name, p in model.named_parameters()}, modes


def test_a_report_edits_no_graph() -> None:
    model = peftfx.transform(ZOO["bert"].build().eval(), "lora(r=2)@attention.query", seed=0)
    graph = Merge()(model.graph()).graph
    before = (dict(graph.derived), graph.text())
    report = Report("Bert")
    add_merged(report, [graph])
    tell = functools.partial(add_rounding, report)
    told = tell_rounding(graph, tell)
    assert len(report.merged) == 2
    assert graph.derived == before[0]
    assert all(graph.derived[name] is recipe for name, recipe in before[0].items())
    assert graph.text() == before[1] == told.text()
    assert {recipe.tell for recipe in told.derived.values()} == {tell}
    assert tell not in {recipe.tell for recipe in graph.derived.values()}


def test_what_an_adapter_does_is_asked_without_activating_it(adapted: AdaptedModel) -> None:
    before = state(adapted)
    with in_eval(adapted):
        seen = adapted.active
        parts = Batched(("other", "low")).capture(adapted, "forward", None)
        assert adapted.active == seen == ("low",)
    assert len(parts) == 1
    assert state(adapted) == before


def test_an_export_leaves_the_model_as_it_was(adapted: AdaptedModel, tmp_path: Path) -> None:
    before = state(adapted)
    adapted.export(tmp_path / "out", batched=["other", "low"])
    assert state(adapted) == before


def test_a_part_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GraphPart("model.onnx", None, None, None).found = ()  # type: ignore[arg-type, misc]


def no_adapter(model: AdaptedModel) -> object:
    return model.disable_adapter()


def other_adapter(model: AdaptedModel) -> object:
    return model.named.acting_as(("other",))


@pytest.mark.parametrize("context", [no_adapter, other_adapter, in_eval])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_it_was(context: Callable[..., object], fails: bool, adapted: AdaptedModel) -> None:
    before = state(adapted)
    grad = torch.is_grad_enabled()
    try:
        with context(adapted):  # type: ignore[attr-defined]
            if context is not in_eval:
                adapted.set_adapter("other")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state(adapted) == before
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("fails", [False, True])
def test_what_other_libraries_say_is_heard_again(fails: bool) -> None:
    def heard() -> object:
        fake = logging.getLogger("torch._subclasses.fake_tensor").level
        say = hf.utils.logging
        bars = (tqdm.tqdm.monitor_interval, say.get_verbosity(), say.is_progress_bar_enabled())
        return fake, bars, logging.raiseExceptions, copy.copy(warnings.filters), warnings.showwarning

    before = heard()
    try:
        with quiet():
            assert heard() != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert heard() == before
