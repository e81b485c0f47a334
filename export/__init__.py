"""Turns a checkpoint into a bundle of ONNX graphs (needs torch; the bundle does not)."""
