"""The commands, one file for each: its options, and the call that it makes."""
