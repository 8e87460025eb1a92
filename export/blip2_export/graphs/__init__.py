"""Networks as ONNX graphs, one module a network."""
