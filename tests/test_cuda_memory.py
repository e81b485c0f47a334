"""The memory half of the GPU executors, on a CUDA runtime that is made of host memory."""

# ruff: noqa: N815  (CUDA's own names)

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hart_runtime import Pipeline
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu, run_bound
from hart_runtime.runtime.backends.sessions import open_sessions
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.memory.cuda import CudaMemory, StreamBackend
from hart_runtime.runtime.memory.executor import Binding

PROMPTS = ["a red circle on a white background", "a small blue star on a yellow background"]


class HostCuda:
    """What :mod:`hart_runtime.runtime.memory.cuda` uses of cuda-python, as late as CUDA may be.

    Whatever is put on the stream happens when somebody waits for it, and not before. Copies must lie
    inside what was allocated.
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=9)

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.stream: list[Callable[[], object]] = []

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, attribute

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        for work in self.stream:
            work()
        self.stream.clear()
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        return 0, self._allocate(self.device, nbytes)

    def cudaMallocHost(self, nbytes: int) -> tuple[int, int]:
        return 0, self._allocate(self.pinned, nbytes)

    def cudaFree(self, address: int) -> tuple[int]:
        assert not self.stream, "work may still use it"
        del self.device[address]
        return (0,)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        assert not self.stream, "a copy may still read it"
        del self.pinned[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        up = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert self._inside(self.device, to if up else source, nbytes)
        assert not up or self._inside(self.pinned, source, nbytes), "only such copies do not wait"
        self.stream.append(lambda: ctypes.memmove(to, source, nbytes))
        return (0,)

    @staticmethod
    def _allocate(where: dict[int, Any], nbytes: int) -> int:
        memory = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)  # NaN
        where[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    @staticmethod
    def _inside(where: dict[int, Any], address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + len(m) for start, m in where.items())


class StandIn(CudaMemory):
    """Runs graphs on the CPU, in the memory that a GPU would have."""

    name, device = "stand-in", "cuda"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._graphs = bundle.manifest.graphs
        self._sessions = open_sessions(bundle, self._graphs, None)

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        session, spec = self._sessions[graph], self._graphs[graph]
        self._cuda.stream.append(lambda: run_bound(session, spec, graph, bindings, host, ("cpu", 0)))

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset({"top_k"}) if graph == "sample" else frozenset()

    def forget(self, calls: range) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    runtime = HostCuda()
    monkeypatch.setattr("hart_runtime.runtime.memory.cuda.cuda", lambda: runtime)
    return runtime


def test_a_picture_in_device_memory(demo_bundle: Path, cuda: HostCuda) -> None:
    bundle = open_bundle(demo_bundle)
    options: dict[str, Any] = {"seed": 3, "smooth": True}
    expected = Pipeline(bundle, on_the_cpu(bundle))(PROMPTS, **options)
    drawn = Pipeline(bundle, StreamBackend(bundle, StandIn(bundle)))
    for batch in (2, 1, 2):  # plans of other sizes, and one that comes again
        found = drawn(PROMPTS, batch=batch, **options)
        assert [np.asarray(a).tolist() for a in found] == [np.asarray(b).tolist() for b in expected]


def test_everything_is_given_back(demo_bundle: Path, cuda: HostCuda) -> None:
    bundle = open_bundle(demo_bundle)
    held: list[int] = []

    def open_part(part: Bundle) -> StreamBackend:
        held.append(len(cuda.device) + len(cuda.pinned))
        return StreamBackend(part, StandIn(part))

    pipeline = Pipeline.for_prompts(bundle, PROMPTS, 2, open_part)
    assert held == [0, 0], "what the text encoder held is there for the rest"
    pipeline(PROMPTS, seed=3)
    assert cuda.device
    assert cuda.pinned
    del pipeline
    gc.collect()
    assert not cuda.device
    assert not cuda.pinned
