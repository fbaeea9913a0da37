"""RowScale keeps every law of peftfx."""

from peftfx_row_scale import RowScale

import peftfx.testing


def test_it_keeps_the_laws() -> None:
    print(peftfx.testing.check(RowScale))
