"""Runs: what `peftfx run` does with an exported directory: a file for each thing that people do with a model."""
