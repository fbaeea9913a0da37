"""Operators that ONNX lacks or ONNX Runtime computes wrongly, written in others, before the translation."""
