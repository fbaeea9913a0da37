"""RowScale, a method of peftfx in a package of its own."""

from peftfx_row_scale.row_scale import RowScale

__all__ = ["RowScale"]
