"""The words for what runs a bundle, as users type them; nothing is imported to say them."""

from __future__ import annotations

import re

from hart_runtime.common.errors import InputError, one_of, parameter

AUTO = "auto"
CPU, CUDA = "cpu", "cuda"
NUMBERED = "cuda:N"
DEVICES = (AUTO, CPU, CUDA, NUMBERED)
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends that run engines, and their Python modules; extras of this project have the same names."""


def parse_device(name: str) -> tuple[str, int]:
    """``"cuda:1"`` is the second GPU that CUDA sees, ``"cuda"`` the first.

    Returns:
        The kind, and the number of the GPU.

    Raises:
        InputError: another word.
    """
    if isinstance(name, str) and (numbered := re.fullmatch(r"cuda:(\d{1,3})", name, re.ASCII)):
        return CUDA, int(numbered[1])
    if name == NUMBERED:
        raise InputError(f"{parameter('device', name)}: expected a number for N, such as cuda:1")
    one_of("device", name, DEVICES)
    return name, 0
