"""Write ONNX models to files: weights are streamed, and a complete directory is moved into place."""
