"""Exports with unmerged adapters: put into a graph when it runs, or chosen by each row of a batch."""
