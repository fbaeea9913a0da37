"""What the files of an adapter have of the base: tensors with other values, and embeddings of other tokens."""
