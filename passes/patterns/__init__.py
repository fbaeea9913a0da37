"""Passes by users' patterns: what matches is rewritten, or given as an output."""
