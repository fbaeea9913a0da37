"""Training from the command line: rows of a file, a thin layer over transformers' Trainer."""
