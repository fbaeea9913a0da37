"""Memory for large tensors, and the memory of objects that are no longer used."""
