"""Exported directories in ONNX Runtime: loaded, run, and driven by transformers' `generate` and pipelines."""
