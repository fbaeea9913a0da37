"""A model of which each process has a part: gathered, and handed out."""
