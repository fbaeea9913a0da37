"""The command line `peftfx`."""
