"""Functions that make captures cheap: shared symbols for sizes, and copies of equal layers."""
