"""RowScale keeps every law of peftfx."""

import peftfx.testing
from peftfx_row_scale import RowScale


def test_it_keeps_the_laws() -> None:
    print(peftfx.testing.check(RowScale))
