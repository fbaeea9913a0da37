"""Passes that preserve every output: they drop operators without effect, and fuse several operators into one."""
