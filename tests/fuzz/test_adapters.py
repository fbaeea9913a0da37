"""Adapter directories: a spoiled one is refused in one message, or means to us what it means to `peft`."""

from __future__ import annotations

from pathlib import Path

import torch
from fuzz.adapter_directories import Adapter, adapters
from fuzz.settle import cases, settle
from fuzz.twins import CONFIGS, Base
from hypothesis import given, settings


@cases(quick=60, many=4000)
def test_a_spoiled_adapter_is_refused_or_does_what_it_does_in_peft(cases: settings, base: Base, tmp_path: Path) -> None:
    @cases
    @given(adapters)
    def check(adapter: Adapter) -> None:
        compare(adapter, base, tmp_path / "adapter")

    check()


def compare(adapter: Adapter, base: Base, directory: Path) -> None:
    """One case."""
    adapter.write(base.twins, directory)
    found = settle(lambda: base.ours(directory))
    assert base.adapted.names() == ()
    if not found.message and (want := base.theirs(directory)) is not None:
        assert isinstance(found.value, torch.Tensor)
        assert found.value.shape == want.shape
        scale = max(1.0, float(want.abs().max()))
        assert float((found.value - want).abs().max()) <= 1e-4 * scale, adapter


def test_every_twin_does_what_it_does_in_peft(base: Base, tmp_path: Path) -> None:
    """Unspoiled: the property is not true for nothing."""
    for name in CONFIGS:
        directory = tmp_path / name
        Adapter(name).write(base.twins, directory)
        assert not settle(lambda: base.ours(directory)).message  # noqa: B023
        assert base.theirs(directory) is not None
        compare(Adapter(name), base, directory)
