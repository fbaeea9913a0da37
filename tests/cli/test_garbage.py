"""A new process looks for garbage rarely, and not at all in what it imported; one that has torch stays as it is."""

from __future__ import annotations

import gc
import subprocess
import sys

from peftfx.cli.garbage import kept_to_the_end, rarely_collected

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
    with rarely_collected(), kept_to_the_end():
        assert gc.isenabled()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() <= frozen  # what was frozen before may go
