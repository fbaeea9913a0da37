"""The sizes at which an export is right: conditions of a capture, tried beside the model's own code."""
