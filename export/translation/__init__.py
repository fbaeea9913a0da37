"""From a Graph to an ONNX model in memory, its weights still to be read."""
