"""Devices and libraries that are stricter than the real ones, for tests without a GPU.

What is put in the place of a library here behaves like it as far as this project (or a careless
change of it) could tell, on memory of the host. It is as late, as early and as unforgiving as the
real one may be, and raises :class:`tests.strict.rules.BrokenRule` where the real one would give
wrong bytes.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from tests.strict.cuda import CudaRuntime
from tests.strict.device import Card, StrictCuda
from tests.strict.onnx_gpu import StrictOnnx
from tests.strict.tensorrt import StrictTensorRT


def install_cuda(
    monkeypatch: pytest.MonkeyPatch,
    cards: tuple[Card, ...] | None = None,
    driver: int = 13000,
    runtime: int = 13000,
    **card: Any,
) -> StrictCuda:
    """Put a CUDA of strict devices in the place of cuda-python.

    Args:
        cards: the GPUs there are; None for one, as the other keywords say (see :class:`Card`).
    """
    cuda = StrictCuda((Card(**card),) if cards is None else cards, driver, runtime)
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.__path__, bindings.__path__ = [], []
    package.bindings = bindings  # type: ignore[attr-defined]
    bindings.runtime = CudaRuntime(cuda)  # type: ignore[attr-defined]
    _put(monkeypatch, "cuda", package)
    _put(monkeypatch, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    return cuda


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda, version: str = "10.16.1.11"
) -> StrictTensorRT:
    """Put a strict TensorRT in the place of ``tensorrt``, or of ``tensorrt_rtx``.

    Args:
        version: one of :func:`tests.strict.api.versions`.
    """
    trt = StrictTensorRT(cuda, version)
    _put(monkeypatch, trt.api.__name__, trt.api)
    return trt


def install_onnx_gpu(monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda) -> StrictOnnx:
    """Put an ONNX Runtime with a strict CUDA provider in the place of ``onnxruntime``."""
    from hart_runtime.runtime.backends import sessions

    onnx = StrictOnnx(cuda)
    _put(monkeypatch, "onnxruntime", onnx.api)
    for name, function in [*vars(sessions).items()]:
        if hasattr(function, "cache_clear"):  # what was found or registered once is another library's
            monkeypatch.setattr(sessions, name, functools.cache(function.__wrapped__))
    return onnx


def _put(monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType) -> None:
    """In the place of an imported module. Libraries ask for the spec of others, torch's compiler for all."""
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
