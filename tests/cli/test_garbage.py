"""A command changes how often garbage is collected, and leaves it as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

from peftfx.cli.garbage import rarely_collected

END = """
import atexit, gc
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))
from peftfx.cli.garbage import rarely_collected
with rarely_collected():
    pass
assert not gc.get_freeze_count()
"""


def test_the_thresholds_are_put_back() -> None:
    before = gc.get_threshold()
    with rarely_collected():
        assert gc.get_threshold() >= (10_000, 10, 10)
        assert gc.isenabled()
    assert gc.get_threshold() == before


def test_the_end_of_a_process_collects_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["frozen", "True"]
