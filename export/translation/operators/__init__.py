"""Translations of single operators to ONNX, where torch has none or a worse one."""
