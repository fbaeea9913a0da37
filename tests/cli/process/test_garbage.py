"""A command looks for garbage rarely, and not at all in what it imported; in Python a capture and an export do."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adapted import adapt

import peftfx
from peftfx.cli.garbage import kept_to_the_end, rarely_to_the_end
from peftfx.memory.garbage import rarely_collected

SCRIPT = """
import gc
from peftfx.cli.garbage import kept_to_the_end
with kept_to_the_end():
    assert not gc.isenabled()
    import torch
assert gc.isenabled() and gc.get_freeze_count() > 10_000
"""


def test_imports_of_a_new_process_are_frozen() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_a_process_that_has_torch_is_left_as_it_is() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with rarely_to_the_end(), kept_to_the_end():
        assert gc.isenabled()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() <= frozen  # what was frozen before may go


@pytest.fixture(params=[(700, 10, 10), (0, 10, 10), (20_000, 5, 5)])
def found(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, int]]:
    """What a user's process has set: Python's default, never, and more rarely than peftfx would."""
    before = gc.get_threshold()
    gc.set_threshold(*request.param)
    yield request.param
    gc.set_threshold(*before)


def test_what_was_set_is_set_again_when_the_last_context_ends(found: tuple[int, int, int]) -> None:
    first, second = rarely_collected(), rarely_collected()
    with first:
        second.__enter__()
        lasting = gc.get_threshold()
    assert lasting == ((10_000, 10, 50) if found[0] == 700 else found)
    assert gc.get_threshold() == lasting  # the second one lasts
    second.__exit__(None, None, None)
    assert gc.get_threshold() == found


def test_python_collects_rarely_in_an_export_and_as_before_later(found: tuple[int, int, int], tmp_path: Path) -> None:
    adapted = adapt("llama", peftfx.LoRA(r=2))
    seen: list[tuple[int, int, int]] = []
    adapted.export(tmp_path / "onnx", view="forward", progress=lambda line: seen.append(gc.get_threshold()))
    assert len(seen) > 2
    assert (found in seen) == (found[0] != 700)
    assert gc.get_threshold() == found
