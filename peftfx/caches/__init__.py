"""What a model keeps between its calls: transformers' caches as plain tensors, and back."""
