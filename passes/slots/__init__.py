"""Passes that give a graph inputs for adapters: slots for one adapter, or a choice of adapters for each row."""
