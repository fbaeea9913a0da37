"""The examples in docstrings run, and each public name has one. They run in a folder with a base and an adapter."""

from __future__ import annotations

import doctest
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from docs.test_docstrings import public
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx import methods as table
from peftfx.contract.method import Method
from peftfx.graph.graph import Graph
from peftfx.model import api

PUBLIC = dict(public())
METHODS = [
    n for n, made in PUBLIC.items() if inspect.isclass(made) and issubclass(made, Method) and n != "PatternMethod"
]
EXAMPLES = {n: text for n, made in PUBLIC.items() if ">>> " in (text := inspect.getdoc(made) or "")}
#: What examples may name, beside `model` and, in those of an adapted model's functions, `adapted`.
NAMES = {"peftfx": peftfx, "torch": torch, "F": F, "dataclass": dataclass, "ClassVar": ClassVar}


def build() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def run(name: str, **names: object) -> dict[str, Any]:
    """Run an example. Returns what it named."""
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], {**NAMES, **names}, name, None, None)
    told = list[str]()
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=told.append, clear_globs=False)
    assert not told, "".join(told)
    return test.globs


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "_registered", dict(table._registered))


@pytest.fixture(scope="module")
def captured() -> tuple[LlamaForCausalLM, Graph]:
    """A base that is captured once for the examples of all methods."""
    model = build()
    return model, api.capture(model)


@pytest.mark.parametrize("name", [n for n in peftfx.__all__ if n in PUBLIC])
def test_each_public_name_has_an_example(name: str) -> None:
    assert name in EXAMPLES, f"{name} has no example: write one in its docstring"
    assert "Examples:\n" in EXAMPLES[name]  # the site shows sections of this name as code, and others as text


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_adapts_a_model(
    name: str, captured: tuple[LlamaForCausalLM, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = captured
    monkeypatch.setattr(api, "capture", lambda *_, **__: graph)
    adapted = run(name, model=model)["adapted"]
    assert any(name == type(rule).__name__ for rule in adapted.adapter(adapted.active_adapter).rules)
    adapted.remove()


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in METHODS])
def test_an_example_runs_and_prints_what_it_says(name: str) -> None:
    model = build()
    model.save_pretrained("base")
    adapted = peftfx.transform(model, peftfx.LoRA(init_lora_weights=False))
    adapted.save_pretrained("adapter")
    if "adapted" in EXAMPLES[name] and ">>> adapted =" not in EXAMPLES[name]:
        run(name, model=model, adapted=adapted)
    else:
        adapted.remove()
        run(name, model=model)
