"""Twins: a base in memory as its weights are read: quantised layers are dequantised late."""
