"""The command `peftfx demo`: train, export and serve an adapter on real data, offline."""
