"""What `peftfx run` does with an exported directory: one module for each kind of input."""
