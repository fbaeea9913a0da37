"""What makes a capture cheap: shared symbols for sizes, and equal layers that are copied."""
