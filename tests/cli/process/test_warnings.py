"""Of warnings the command line shows peftfx's own, one line each, and those of other libraries not."""

from __future__ import annotations

import warnings

import pytest

from peftfx.cli.speech import quiet
from peftfx.errors import warn


def test_peftfxs_own_warnings_are_shown_each_time_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), quiet():
        for _ in range(2):
            warn("outputs are others at conv")
            warnings.warn("of a library", UserWarning, stacklevel=1)
    shown = capsys.readouterr()
    assert shown.err == "warning: outputs are others at conv\n" * 2
    assert shown.out == ""
