"""The words for what runs a bundle, as users type them; nothing is imported to say them."""

AUTO = "auto"
CPU, CUDA = "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends that run engines, and their Python modules; extras of this project have the same names."""
