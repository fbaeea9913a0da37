"""The report of an export: its fields and words, what an export adds to it, and its page."""
