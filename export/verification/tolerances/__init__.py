"""What may differ: the tolerance of an output, measured against float64."""
