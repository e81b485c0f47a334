"""Names that a command line offers; nothing heavy is imported to show them."""

from __future__ import annotations

from hart_runtime.runtime.tensorrt.package import MODULES

OPENVINO = "openvino"
BACKENDS = ("auto", "onnxruntime", OPENVINO, *MODULES)
"""Choices of ``--backend``, see :func:`hart_runtime.runtime.backend.open_backend`."""
