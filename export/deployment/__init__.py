"""The graphs that a model is served by, and the files beside them that other runtimes read."""
