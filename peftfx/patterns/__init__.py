"""Users' patterns: a plain torch function, and the places where a graph computes the same."""
