"""From an ONNX model to files: weights streamed, rounded where asked for, the directory moved into place when whole."""
