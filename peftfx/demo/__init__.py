"""`peftfx demo`: the whole way of an adapter on real input, offline."""
