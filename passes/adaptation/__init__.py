"""Passes that put adapters into a graph, take them out, and turn them into recipes of weights."""
