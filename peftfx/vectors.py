"""Vectors that broadcast against activations and weights, for authors of methods; see `peftfx.contract.broadcast`."""

from peftfx.contract.broadcast import adapter_dtype, along_channels, along_columns, along_rows, row_index

__all__ = ["adapter_dtype", "along_channels", "along_columns", "along_rows", "row_index"]
