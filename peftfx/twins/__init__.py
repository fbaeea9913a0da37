"""Twins: a second view of a base in memory, whose quantised layers are dequantised only when their values are read."""
