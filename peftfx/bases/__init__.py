"""Base models: loaded from local directories, what they are for, and example inputs for them."""
