"""A file for each command: its options, and the call that it makes."""
