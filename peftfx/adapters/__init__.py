"""Adapters: trainable state by name, what is made of it (sums, merged weights, ranks), and its files."""
