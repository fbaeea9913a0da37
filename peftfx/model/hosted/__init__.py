"""What runs adapters: the base, which several adapted models may share, and the road that calls take."""
