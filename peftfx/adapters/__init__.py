"""Adapters: named trainable tensors, what is computed from them (sums, merged weights, LoRAs), and their files."""
