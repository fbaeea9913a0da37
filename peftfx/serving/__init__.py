"""Run exported directories in ONNX Runtime: load and call them, with transformers' `generate` and pipelines."""
