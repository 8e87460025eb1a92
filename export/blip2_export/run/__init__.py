"""Runs the graphs of a bundle with ONNX Runtime the way the engine does."""
