"""Passes that keep every output: what does nothing is dropped, what is spelled out becomes one operator."""
