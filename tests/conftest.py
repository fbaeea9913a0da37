"""What all tests share: one thread a worker, and each model of the zoo built and captured once in a session."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import transformers
from hypothesis import settings
from support.captures import own_capture, remembering
from support.command import peftfx as peftfx
from support.zoo import ZOO, Captured

from peftfx.methods import forgetting_registered
from peftfx.model.adapted import AdaptedModel
from peftfx.patterns.pattern import forget, known_patterns
from peftfx.sites.site import PATTERN
from peftfx.views import capture as capturing
from peftfx.views.capture import capture

torch.set_num_threads(1)
settings.register_profile("whole")  # `--hypothesis-profile=whole`: the laws on all of their examples


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden`: what is held to a golden file is written there instead."""
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")
    parser.addoption("--capture-each", action="store_true", help="capture each model, seen before or not")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws at random is the same in each run, whichever tests ran before it."""
    transformers.set_seed(0)


def pytest_collection_finish() -> None:
    """What was imported by now lives to the end: no collection of garbage needs to walk through it again.

    Patterns that files make when they are imported are forgotten: no graph of the first tests is searched for them.
    """
    forget([pattern.name for pattern in known_patterns()])
    gc.set_threshold(10_000, 10, 10)  # a capture makes objects by the hundred thousand, and few are in circles
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _captured_once(pytestconfig: pytest.Config) -> Iterator[None]:
    """Models of one structure are captured once in a session."""
    with pytest.MonkeyPatch.context() as patch:
        if not pytestconfig.getoption("--capture-each"):
            patch.setattr(capturing, "_captured", remembering())
        yield


@pytest.fixture
def capture_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture each time: for tests that watch captures."""
    monkeypatch.setattr(capturing, "_captured", own_capture)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> Iterator[None]:
    """After a module its garbage is gone, and what it imported, or captured for all, is not walked through again.

    So are the patterns that it made, for which every graph would be searched, and the methods that it registered, which
    `peftfx methods` would list.
    """
    with forgetting_registered():
        yield
    forget([pattern.name for pattern in known_patterns()])
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Captured]:
    """`captured(name)`: a model of the zoo in eval mode and its graph."""

    @cache
    def make(name: str) -> Captured:
        model = ZOO[name].build()
        graph = capture(model, ZOO[name].inputs(model=model))
        own = tuple(site for site in graph.sites if site.kind != PATTERN)  # a test's patterns are not another's
        graph.sites = dataclasses.replace(graph.sites, items=own)
        return Captured(ZOO[name], model, graph)

    return make


@pytest.fixture(scope="session")
def bare(captured: Callable[[str], Captured]) -> Callable[[str], AdaptedModel]:
    """`bare(name)`: the same model without adapters; a test leaves none on it."""

    @cache
    def make(name: str) -> AdaptedModel:
        found = captured(name)
        return AdaptedModel.on(found.model, found.graph.sites, found.entry.inputs(model=found.model))

    return make
