"""The public Python calls, with what a user gives them by mistake: each works, or is refused in one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fuzz.adapter_directories import SPOILS, Spoil, spoiled
from fuzz.settle import cases, settle, tree
from fuzz.twins import Base
from fuzz.values import values, words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftfx.methods
from peftfx import runtime

NAMES = (
    "default",
    "first",
    "",
    "a b",
    "5",
    "class",
    "é",
    "training",
    "x" * 300,
    5,
    None,
    ["first"],
    ("first", "first"),
)
names = st.one_of(st.sampled_from(NAMES), values)
PATHS = ("", ".", "nowhere", "x" * 300, "\u0000", "a/b/c", "adapter", "lora")
paths = st.sampled_from(PATHS)
RULES = (
    "lora",
    "lora(r=2)@mlp",
    "ia3; lora",
    "lora@nothing",
    "(",
    "",
    5,
    None,
    [],
    [5],
    ["lora", None],
    {"r": 8},
    b"lora",
)
rules = st.one_of(st.sampled_from(RULES), values, st.sampled_from([peftfx.LoRA, peftfx.LoRA(r=2), peftfx.IA3()]))
options = st.dictionaries(
    st.sampled_from(["r", "lora_alpha", "target", "bias", "rank_pattern", "x"]), values, max_size=2
)


@dataclass(frozen=True)
class Said:
    """A method of an adapted model that has the adapters `first` and `second`, and what it is given."""

    name: str
    arguments: tuple[object, ...] = ()
    options: tuple[tuple[str, object], ...] = ()


said = st.one_of(
    st.builds(lambda n, r: Said("add_adapter", (n, r)), names, rules),
    st.builds(lambda n: Said("set_adapter", (n,)), names),
    st.builds(lambda n: Said("remove", (n,)), st.sampled_from(NAMES)),
    st.builds(lambda n: Said("adapter", (n,)), names),
    st.builds(lambda p, n: Said("load_adapter", (p, n)), paths, names),
    st.builds(lambda p, n: Said("save_pretrained", (p, n)), paths, names),
    st.builds(
        lambda n, w, new, how: Said("add_weighted_adapter", (n, w, new, how)),
        st.sampled_from([["first"], ["first", "second"], ["first", "nobody"], [], "first"]),
        st.sampled_from([[1.0], [1.0, 2.0], [], ["a"], [float("nan"), 1.0], 5]),
        st.sampled_from(["new", "first", ""]),
        st.sampled_from(["linear", "cat", "svd", 5]),
    ),
    st.builds(lambda v: Said("update_and_allocate", (v,)), values),
    st.builds(lambda v: Said("view", (v,)), words),
)


@cases(quick=40, many=1500)
def test_a_call_of_an_adapted_model(
    cases: settings, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    @cases
    @given(said)
    def check(call: Said) -> None:
        speak(call, base, tmp_path)

    check()


@cases(quick=20, many=500)
def test_a_spoiled_state_is_loaded_or_refused(cases: settings, base: Base) -> None:
    @cases
    @given(st.lists(st.builds(Spoil, st.sampled_from(SPOILS), st.integers(0, 30)), min_size=1, max_size=2).map(tuple))
    def check(spoils: tuple[Spoil, ...]) -> None:
        recall(spoils, base)

    check()


@cases(quick=20, many=500)
def test_options_of_a_method(cases: settings) -> None:
    @cases
    @given(st.sampled_from(sorted(peftfx.methods.methods())), options)
    def check(name: str, given: Mapping[str, object]) -> None:
        cls = peftfx.methods.method_named(name)
        settle(lambda: cls(**{n: v for n, v in given.items() if n in cls.options()}))

    check()


CALLS: Mapping[str, Callable[[Base], object]] = {
    "a model that is none": lambda base: peftfx.transform("gpt2", "lora"),  # type: ignore[arg-type]
    "a model without inputs": lambda base: peftfx.transform(nn.Linear(2, 2), "lora"),
    "inputs that are none": lambda base: peftfx.inspect(nn.Linear(2, 2), inputs=5),  # type: ignore[arg-type]
    "inputs of other names": lambda base: peftfx.inspect(nn.Linear(2, 2), inputs={"x": torch.ones(2)}),
    "inputs of another size": lambda base: peftfx.inspect(nn.Linear(2, 2), inputs={"input": torch.ones(3)}),
    "rules that are none": lambda base: peftfx.plan(nn.Linear(2, 2), 5, inputs={"input": torch.ones(1, 2)}),
    "a path that is none": lambda base: runtime.load("x" * 300),
    "an empty path": lambda base: runtime.load(base.root / "lora"),
    "an export to no path": lambda base: base.adapted.export("\u0000"),
    "an export to nowhere": lambda base: base.adapted.export(base.root / ("x" * 300)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_makes_no_sense(name: str, base: Base) -> None:
    assert settle(lambda: CALLS[name](base)).message


def speak(call: Said, base: Base, directory: Path) -> None:
    """One case: where it is refused nothing is written, and the adapters are what they were."""
    adapted = base.adapted
    adapted.add_adapter("first", "lora(r=2)@attention.query", seed=0)
    adapted.add_adapter("second", "lora(r=1)@attention.query", seed=0)
    before, state = tree(directory), adapted.state_dict().keys()
    try:
        found = settle(lambda: getattr(adapted, call.name)(*call.arguments, **dict(call.options)))
        if found.message:
            assert tree(directory) == before
            assert adapted.state_dict().keys() == state
    finally:
        adapted.remove()


def recall(spoils: tuple[Spoil, ...], base: Base) -> None:
    """One case."""
    base.adapted.add_adapter("first", "lora(r=2)@attention.query", seed=0)
    try:
        state = spoiled(base.adapted.state_dict(), spoils)
        before = {name: t.clone() for name, t in base.adapted.state_dict().items()}
        if settle(lambda: base.adapted.load_state_dict(state)).message:
            assert all(torch.equal(t, before[name]) for name, t in base.adapted.state_dict().items())
    finally:
        base.adapted.remove()
