"""HF PEFT directories, read and written."""
