"""The adapted model: what `peftfx.transform` and `peftfx.load` return, its graphs, plans and generation."""
