"""Training from the command line: the rows of a file, and a thin layer over transformers' Trainer."""
