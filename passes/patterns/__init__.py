"""Passes that use the user's patterns: rewrite each match, or return its value as an output."""
