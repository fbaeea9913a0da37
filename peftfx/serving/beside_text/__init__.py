"""Exported models that generate text about images or sounds. A graph of its own encodes these once."""
