"""Patterns of one's own: a plain torch function, and where a graph computes what it computes."""
