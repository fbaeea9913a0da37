"""Write the quantised weights of a base to ONNX with their codes unchanged: no weight is rounded again."""
