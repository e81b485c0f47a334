"""Puts the strict stand-ins in the place of CUDA and its libraries, where this folder is on the path.

Libraries by name in HART_STANDINS (``tensorrt-rtx`` or ``tensorrt``, ``onnxruntime``), with a version if it
has to be one, as ``tensorrt=11.4.0.106``; the card's compute capability in HART_STANDIN_CAPABILITY, 8.7
being a Jetson's. ``CUDA_VISIBLE_DEVICES`` hides the card.
"""

import os
import sys
from importlib.machinery import ModuleSpec

import pytest

from tests.strict import install_cuda, install_onnx_gpu, install_tensorrt
from tests.strict.api import RTX
from tests.strict.device import ORIN, Card

_VERSIONS = {"tensorrt": "10.16.1.11", "tensorrt-rtx": RTX}


def _install() -> None:
    patch, wanted = pytest.MonkeyPatch(), os.environ.get("HART_STANDINS", "").split(",")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        install_cuda(patch, cards=())
        return
    capability = os.environ.get("HART_STANDIN_CAPABILITY", "8.9")
    major, minor = capability.split(".")
    card = ORIN if capability == "8.7" else Card(capability=(int(major), int(minor)))
    cuda = install_cuda(patch, (card,))
    for name in wanted:
        package, _, version = name.partition("=")
        if package in _VERSIONS:
            install_tensorrt(patch, cuda, version or _VERSIONS[package])
    if "onnxruntime" in wanted:
        install_onnx_gpu(patch, cuda)
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        if name in sys.modules and sys.modules[name].__spec__ is None:  # others ask whether it is installed
            sys.modules[name].__spec__ = ModuleSpec(name, None)


_install()
