"""Sizes during a capture: which stay free, what ties them, and what the code assumes of them."""
