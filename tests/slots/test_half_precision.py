"""Graphs with slots, adapters for them, and graphs by row in half precision: small faults are seen without rounding."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from support.slots import stirred
from torch import Tensor
from verification.spoiled import one_percent_more, spoil_captures

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.export.slots import adapter_check, adapter_export, batched
from peftfx.export.slots.adapter_tensors import AdapterTensors
from peftfx.export.verification import verify
from peftfx.export.verification.comparison import Comparison, VerificationError
from peftfx.graph.slots import SLOT_B
from peftfx.method import Method
from peftfx.model.adapted import AdaptedModel

HALVES = (torch.float16, torch.bfloat16)
FEW = (HALVES[0], pytest.param(HALVES[1], marks=pytest.mark.further))
OWN_CODE = "the model's own code and its graph differ in logits"
#: A scale that half precision rounds: its product with a factor is another number in a slot.
LORA = peftfx.LoRA(r=3, lora_alpha=5, target="all-linear")
RULES = {
    "lora": LORA,
    "dora": peftfx.LoRA(r=3, lora_alpha=5, target="attention", use_dora=True),
    "ia3": peftfx.IA3(),
    "norms": peftfx.LNTuning(),
    "prompt": peftfx.PromptTuning(num_virtual_tokens=3),
    "prefix": peftfx.PrefixTuning(num_virtual_tokens=3),
}


def adapted(kind: torch.dtype, rule: Method = LORA) -> AdaptedModel:
    return stirred(peftfx.transform(build("text-generation", "llama").to(kind), rule, "x", seed=0), "x")


def graph_with_slots(kind: torch.dtype, directory: Path, view: str = "forward") -> Path:
    peftfx.export_onnx(build("text-generation", "llama").to(kind), directory, view=view, slots="all-linear")
    return directory


@pytest.fixture(scope="module")
def forward_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """`forward_graph(kind)`: the directory of a forward graph with slots."""
    return functools.cache(lambda kind: graph_with_slots(kind, tmp_path_factory.mktemp("forward") / "graph"))


@pytest.mark.further
@pytest.mark.parametrize("kind", HALVES)
def test_adapters_for_a_graph_are_held_without_rounding(
    kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, hold = list[bool](), adapter_check.hold_without_rounding
    monkeypatch.setattr(adapter_check, "hold_without_rounding", lambda *a, **k: held.append(hold(*a, **k)) or held[-1])
    with warnings.catch_warnings(action="ignore", category=PeftfxWarning):  # no kernels for bfloat16
        graph = graph_with_slots(kind, tmp_path / "graph", "decode")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        for name in RULES:
            peftfx.export_adapter(adapted(kind, RULES[name]), graph, tmp_path / name)
    assert held == [True] * len(RULES)


@pytest.mark.further
@pytest.mark.parametrize("kind", FEW)
def test_an_adapters_tensor_that_is_a_little_off_is_told(
    kind: torch.dtype,
    forward_graph: Callable[[torch.dtype], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = adapter_export.slot_tensors

    def wrong(*given: object) -> dict[str, dict[str, Tensor]]:
        found = right(*given)  # type: ignore[arg-type]
        name = next(name for name in found["model"] if name.endswith(SLOT_B))
        return {"model": {**found["model"], name: found["model"][name] * 1.003}}

    graph = forward_graph(kind)
    monkeypatch.setattr(adapter_export, "slot_tensors", wrong)
    with pytest.warns(PeftfxWarning, match=OWN_CODE):
        peftfx.export_adapter(adapted(kind), graph, tmp_path / "x")


@pytest.mark.parametrize("kind", FEW)
def test_one_percent_at_one_layer_of_a_graph_is_seen_when_an_adapter_is_written(
    kind: torch.dtype,
    forward_graph: Callable[[torch.dtype], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, right = forward_graph(kind), adapter_check.with_rounded_numbers
    monkeypatch.setattr(adapter_check, "with_rounded_numbers", lambda graph: one_percent_more(right(graph)))
    with pytest.raises(VerificationError, match="without rounding to half precision"):
        peftfx.export_adapter(adapted(kind), graph, tmp_path / "x")
    assert not (tmp_path / "x.onnx_adapter").exists()


def test_a_graph_with_slots_that_is_not_the_models_own_code_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_captures(monkeypatch)
    with pytest.warns(PeftfxWarning, match=OWN_CODE):
        graph_with_slots(torch.float16, tmp_path / "graph")


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("view", ["decode", pytest.param("forward", marks=pytest.mark.further)])
def test_rows_are_held_without_rounding(
    kind: torch.dtype, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stack loses when it is rounded is no fault, and a factor that is off by a little is one."""
    model = adapted(kind)
    model.add_adapter("prompt", RULES["prompt"], seed=0)
    stirred(model, "prompt")
    right = batched.stacks_of_rows
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        model.export(tmp_path / "rows", view=view, batched=("x", "prompt"), progress=lambda line: None)

    def wrong(model: AdaptedModel, each: list[AdapterTensors]) -> tuple[Mapping[tuple[str, str], Tensor], object]:
        stacks, kinds = right(model, each)
        place = next((place for place in stacks if place[1] == SLOT_B), None)
        return (stacks if place is None else {**stacks, place: stacks[place] * 1.003}), kinds

    monkeypatch.setattr(batched, "stacks_of_rows", wrong)
    with pytest.warns(PeftfxWarning, match=OWN_CODE):
        model.export(tmp_path / "wrong", view=view, batched=("x", "prompt"), progress=lambda line: None)


@pytest.mark.further
def test_more_adapters_than_a_call_has_rows_are_all_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call was held without rounding, and what no row of it chose was not."""
    names = [f"a{i}" for i in range(7)]
    model = stirred(peftfx.transform(build("text-generation", "llama").half(), LORA, names[0], seed=0), names[0])
    for name in names[1:]:
        model.add_adapter(name, LORA, seed=0)
        stirred(model, name)
    right, off = batched.stacks_of_rows, list[int]()

    def wrong(model: AdaptedModel, each: list[AdapterTensors]) -> tuple[Mapping[tuple[str, str], Tensor], object]:
        stacks, kinds = right(model, each)
        factors = torch.ones(len(names) + 1)
        factors[off] = 1.003
        of = {place: factors.reshape(-1, *[1] * (value.ndim - 1)) for place, value in stacks.items()}
        return {p: v * of[p].to(v.dtype) if p[1] == SLOT_B else v for p, v in stacks.items()}, kinds

    monkeypatch.setattr(batched, "stacks_of_rows", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        model.export(tmp_path / "rows", view="forward", batched=names, progress=lambda line: None)
    for number in (0, 3, 6):
        off[:] = [number + 1]  # none comes first
        with pytest.warns(PeftfxWarning, match=OWN_CODE):
            model.export(tmp_path / f"off{number}", view="forward", batched=names, progress=lambda line: None)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("view", ["decode", pytest.param("forward", marks=pytest.mark.further)])
def test_the_scores_of_routers_are_those_of_each_rows_adapter(
    kind: torch.dtype, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference runs once for each adapter, and each time all rows are routed."""
    asked, right = [], verify._Asked.under_choices

    def under(*arguments: object) -> list[Comparison]:
        asked.append(right(*arguments))  # type: ignore[arg-type]
        return asked[-1]

    monkeypatch.setattr(verify._Asked, "under_choices", under)
    model = peftfx.transform(build("text-generation", "mixtral").to(kind), LORA, "x", seed=0)
    stirred(model, "x").export(tmp_path / "rows", view=view, batched=("x",))
    assert any(asked)
