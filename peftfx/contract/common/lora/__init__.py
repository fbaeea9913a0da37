"""What LoRA and its variants are made of: starts, factors, DoRA, diagonal blocks, KaSA, files and sums."""
