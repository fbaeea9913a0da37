"""Generation: what stands in front of transformers' `generate` so that a graph answers each of its steps."""
