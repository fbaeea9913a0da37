"""The tensors that a model keeps between its calls: transformers' caches to plain tensors, and back."""
