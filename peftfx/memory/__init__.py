"""Memory for large tensors."""
