"""What rounding weights costs the outputs, measured: GPTQ on a text, bits by role under a budget."""
