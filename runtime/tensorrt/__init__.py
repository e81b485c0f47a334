"""Engines for NVIDIA GPUs: built from a bundle's graphs, and run by the same loop."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends and the Python modules they run on; the extras of this project have the same names."""
