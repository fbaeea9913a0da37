"""Targets, under the name that documents use: which sites an expression picks, and why; see `peftfx.sites.target`."""

from peftfx.sites.target import Match, Reason, Where, explain, select

__all__ = ["Match", "Reason", "Where", "explain", "select"]
