"""The graphs of a base: kept, derived, and dropped when what they were made from is another."""
