"""What ONNX Runtime computes, held against what torch computes, at sizes that no capture saw."""
