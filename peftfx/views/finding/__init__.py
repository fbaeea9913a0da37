"""Finds the views of a model by its forward, its config and runs on fake tensors, for any architecture."""
