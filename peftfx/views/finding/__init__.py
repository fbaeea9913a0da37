"""Which views a model has: found by its forward, its config and runs on fake tensors, whatever its architecture."""
