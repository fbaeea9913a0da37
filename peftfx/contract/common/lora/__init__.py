"""The parts of LoRA and its variants: starts, factors, DoRA, diagonal blocks, KaSA, files and sums."""
