"""Sentence embeddings: bases with sentence-transformers' `modules.json`, whose pooling is part of the model."""
