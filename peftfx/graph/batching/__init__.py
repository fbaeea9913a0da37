"""Runs a captured program of one example for several examples at once, with one more axis."""
