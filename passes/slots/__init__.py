"""Passes that give a graph inputs for adapters: slots to put one in, and rows that choose their own."""
