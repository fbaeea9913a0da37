"""Summaries without running a model: what a directory holds, how two differ, and what an export would write."""
