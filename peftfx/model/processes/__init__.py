"""Sharded models, of which each process has a part: gathering and loading."""
