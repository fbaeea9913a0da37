"""Quantised weights of the base in ONNX, as they are: no code is rounded again."""
