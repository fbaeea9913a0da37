"""Targets, under the name that documents use: which sites an expression picks, and why; see `peftfx.sites.target`."""

from peftfx.sites.target import Reason, SelectedSite, Where, explain, select

__all__ = ["Reason", "SelectedSite", "Where", "explain", "select"]
