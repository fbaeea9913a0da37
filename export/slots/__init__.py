"""Exports with adapters apart: put into a graph when it runs, or chosen by each row of a batch."""
