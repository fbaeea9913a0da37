"""Summaries without running a model: what a directory holds, how two directories differ, what an export would write."""
