"""Sentence embeddings: bases with sentence-transformers' `modules.json`, whose pooling is a part of the model."""
