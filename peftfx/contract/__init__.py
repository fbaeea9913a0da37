"""The contract that a method fulfils for each kind of site. Authors import its names from `peftfx.method`."""
