"""Compare what ONNX Runtime computes with what torch computes, at sizes that no capture saw."""
