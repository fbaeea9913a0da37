"""Passes that insert adapters into a graph, remove them, and turn them into recipes of merged weights."""
