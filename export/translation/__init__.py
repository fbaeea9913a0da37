"""Translate a graph to an ONNX model in memory, whose weights are read later, when they are written."""
