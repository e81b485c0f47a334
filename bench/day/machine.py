"""What this machine is, and what it lacks: ``python -m hart_runtime.bench.day.machine`` says it as JSON.

A process of its own, so that whoever asks does not hold the GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from hart_runtime.common.errors import InputError
from hart_runtime.common.install import clone, install, installed
from hart_runtime.runtime.backends.names import MODULES, ONNXRUNTIME
from hart_runtime.runtime.backends.sessions import require_cuda
from hart_runtime.runtime.memory.gpu import Gpu, driver_version, find_gpu
from hart_runtime.runtime.tensorrt.package import import_package

TESTS, TORCH, EXPORT, COMPARE, BENCH = "tests", "torch", "export", "compare", "bench"
"""What parts need beside backends."""
LIBRARIES = ("hart-runtime", "onnxruntime", "cuda-", "tensorrt", "torch", "triton", "nvidia-", "numpy")
"""Beginnings of the distributions that are listed."""
ON_THE_GPU = "import torch; torch.zeros(1).cuda()"


def describe() -> dict[str, Any]:
    """The GPU, its driver, libraries, and by name what is not there, each in a sentence.

    Without a GPU that can be used ``gpu`` is None and ``why`` says why.
    """
    try:
        gpu = find_gpu()
    except InputError as error:
        return {"gpu": None, "why": str(error)}
    return {
        "gpu": asdict(gpu),
        "driver": ".".join(map(str, driver_version())),
        "python": sys.version.split()[0],
        "libraries": dict(sorted(_libraries())),
        "machine": _facts(),
        "lacks": dict(_lacking(gpu)),
    }


def _libraries() -> Iterator[tuple[str, str]]:
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"] or ""
        if name.lower().startswith(LIBRARIES):
            yield name, found.version


def _facts() -> dict[str, Any]:
    """Processor, memory, clocks, Jetson board; nothing without the libraries that tell."""
    if not (installed("psutil") and installed("pynvml")):
        return {}
    from hart_runtime.bench.machine import describe_machine

    return describe_machine()


def _lacking(gpu: Gpu) -> Iterator[tuple[str, str]]:
    """What is not here on purpose. What is installed and does not work is not in the list: it has to open."""
    if clone() is None:
        yield TESTS, "the tests are in a clone of the repository alone, found an installed package"
    elif not installed("pytest"):
        yield TESTS, f"pytest is not installed; install it with: {install('dev')}"
    for name, modules in {
        EXPORT: ("torch", "onnxscript", "safetensors"),
        COMPARE: ("polygraphy", "skimage"),
        BENCH: ("psutil", "pynvml", "matplotlib", "onnx"),
    }.items():
        if missing := [module for module in modules if not installed(module)]:
            yield name, f"{', '.join(missing)} not installed; install with: {install(name)}"
    done = subprocess.run([sys.executable, "-c", ON_THE_GPU], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield TORCH, f"torch does not compute on this GPU ({said})"
    try:
        require_cuda()
    except InputError as error:
        if not _distributed("onnxruntime-gpu"):
            yield ONNXRUNTIME, str(error)
    for name, module in MODULES.items():
        if module not in sys.modules and not installed(module):
            yield name, f"{name} is not installed; install it with: {install(name)}"
        elif sentence := _not_for(gpu, name):
            yield name, sentence


def _not_for(gpu: Gpu, name: str) -> str | None:
    """Why a TensorRT that builds ahead of time is not meant for a GPU."""
    try:
        package = import_package(name)
    except InputError:
        return None
    if not package.ahead_of_time:
        return None
    known = package.api.ComputeCapability.__members__
    if f"SM{gpu.capability.replace('.', '')}" in known:
        return None
    return f"{name} {package.version} does not build for compute capability {gpu.capability}"


def _distributed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(describe()))
