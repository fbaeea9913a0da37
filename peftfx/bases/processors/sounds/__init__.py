"""Examples of sounds: the shapes of recordings, and those that are written into a text."""
