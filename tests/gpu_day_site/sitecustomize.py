"""Puts the strict stand-ins in the place of CUDA and its libraries, where this folder is on the path.

Libraries by name in HART_STANDINS (``tensorrt-rtx`` or ``tensorrt``, ``onnxruntime``), the card's compute
capability in HART_STANDIN_CAPABILITY; ``CUDA_VISIBLE_DEVICES`` hides the card.
"""

import os
import sys
from importlib.machinery import ModuleSpec

import pytest

from tests.strict import install_cuda, install_onnx_gpu, install_tensorrt

_VERSIONS = {"tensorrt": "10.16.1.11", "tensorrt-rtx": "1.7.1.116"}


def _install() -> None:
    patch, wanted = pytest.MonkeyPatch(), os.environ.get("HART_STANDINS", "").split(",")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        install_cuda(patch, cards=())
        return
    major, minor = os.environ.get("HART_STANDIN_CAPABILITY", "8.9").split(".")
    cuda = install_cuda(patch, capability=(int(major), int(minor)))
    for name in set(wanted) & set(_VERSIONS):
        install_tensorrt(patch, cuda, _VERSIONS[name])
    if "onnxruntime" in wanted:
        install_onnx_gpu(patch, cuda)
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        if name in sys.modules and sys.modules[name].__spec__ is None:  # others ask whether it is installed
            sys.modules[name].__spec__ = ModuleSpec(name, None)


_install()
