"""Rewrites of a program of torch.export, in place, before it becomes a Graph."""
