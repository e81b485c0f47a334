"""The part of ``cuda.bindings.runtime`` that this project uses, over the stand-in's ``libcudart``.

The real bindings carry a CUDA runtime of their own, which wants a driver. As there, a call returns a tuple:
its status, then what it made.
"""

# ruff: noqa: N801, N815, N816  (CUDA's own names)

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from types import SimpleNamespace
from typing import Any

_library = ctypes.CDLL("libcudart.so.13")


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidMemcpyDirection = 21
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrIntegrated = 18
    cudaDevAttrL2CacheSize = 38
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


cudaStreamDefault, cudaStreamNonBlocking = 0, 1
cudaEventDefault, cudaEventBlockingSync, cudaEventDisableTiming = 0, 1, 2
cudaHostAllocDefault, cudaHostAllocPortable, cudaHostAllocMapped, cudaHostAllocWriteCombined = 0, 1, 2, 4


def _call(name: str, *taken: Any, made: tuple[Any, ...] = (), made_last: bool = False) -> Callable[..., Any]:
    """A function of the library: types of what it takes, and of what it writes to addresses it is given."""
    function = getattr(_library, name)
    pointers = [POINTER(kind) for kind in made]
    function.argtypes = [*taken, *pointers] if made_last else [*pointers, *taken]

    def call(*given: Any) -> tuple[Any, ...]:
        results = [kind() for kind in made]
        addresses = [byref(result) for result in results]
        fed = [kind(int(value)) for kind, value in zip(taken, given, strict=True)]
        status = function(*(fed + addresses if made_last else addresses + fed))
        return cudaError_t(status), *(result.value or 0 for result in results)

    return call


_address, _handle, _flags = c_void_p, c_void_p, c_uint

cudaGetDeviceCount = _call("cudaGetDeviceCount", made=(c_int,))
cudaGetDevice = _call("cudaGetDevice", made=(c_int,))
cudaSetDevice = _call("cudaSetDevice", c_int)
cudaDeviceGetAttribute = _call("cudaDeviceGetAttribute", c_int, c_int, made=(c_int,))
cudaDriverGetVersion = _call("cudaDriverGetVersion", made=(c_int,))
cudaRuntimeGetVersion = _call("cudaRuntimeGetVersion", made=(c_int,))
getLocalRuntimeVersion = cudaRuntimeGetVersion
cudaMemGetInfo = _call("cudaMemGetInfo", made=(c_size_t, c_size_t))
cudaDeviceSynchronize = _call("cudaDeviceSynchronize")

cudaMalloc = _call("cudaMalloc", c_size_t, made=(_address,))
cudaFree = _call("cudaFree", _address)
cudaMallocHost = _call("cudaMallocHost", c_size_t, made=(_address,))
cudaHostAlloc = _call("cudaHostAlloc", c_size_t, _flags, made=(_address,))
cudaFreeHost = _call("cudaFreeHost", _address)
cudaMemcpyAsync = _call("cudaMemcpyAsync", _address, _address, c_size_t, c_int, _handle)
cudaMemsetAsync = _call("cudaMemsetAsync", _address, c_int, c_size_t, _handle)

cudaStreamCreateWithFlags = _call("cudaStreamCreateWithFlags", _flags, made=(_handle,))
cudaStreamDestroy = _call("cudaStreamDestroy", _handle)
cudaStreamSynchronize = _call("cudaStreamSynchronize", _handle)
cudaStreamQuery = _call("cudaStreamQuery", _handle)
cudaStreamWaitEvent = _call("cudaStreamWaitEvent", _handle, _handle, _flags)
cudaStreamBeginCapture = _call("cudaStreamBeginCapture", _handle, c_int)
cudaStreamEndCapture = _call("cudaStreamEndCapture", _handle, made=(_handle,), made_last=True)
cudaStreamIsCapturing = _call("cudaStreamIsCapturing", _handle, made=(c_int,), made_last=True)

cudaEventCreate = _call("cudaEventCreate", made=(_handle,))
cudaEventCreateWithFlags = _call("cudaEventCreateWithFlags", _flags, made=(_handle,))
cudaEventDestroy = _call("cudaEventDestroy", _handle)
cudaEventRecord = _call("cudaEventRecord", _handle, _handle)
cudaEventQuery = _call("cudaEventQuery", _handle)
cudaEventSynchronize = _call("cudaEventSynchronize", _handle)
cudaEventElapsedTime = _call("cudaEventElapsedTime", _handle, _handle, made=(c_float,))

cudaGraphInstantiate = _call("cudaGraphInstantiate", _handle, ctypes.c_ulonglong, made=(_handle,))
cudaGraphLaunch = _call("cudaGraphLaunch", _handle, _handle)
cudaGraphDestroy = _call("cudaGraphDestroy", _handle)
cudaGraphExecDestroy = _call("cudaGraphExecDestroy", _handle)

cudaGetLastError = _call("cudaGetLastError")
cudaPeekAtLastError = _call("cudaPeekAtLastError")


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, SimpleNamespace]:
    status, memory = cudaMemGetInfo()[::2]
    attribute = cudaDeviceAttr
    asked = {
        "major": attribute.cudaDevAttrComputeCapabilityMajor,
        "minor": attribute.cudaDevAttrComputeCapabilityMinor,
        "multiProcessorCount": attribute.cudaDevAttrMultiProcessorCount,
        "integrated": attribute.cudaDevAttrIntegrated,
    }
    found = {name: cudaDeviceGetAttribute(number, device)[1] for name, number in asked.items()}
    bus = {"pciDomainID": 0, "pciBusID": 1, "pciDeviceID": 0}
    return status, SimpleNamespace(name=b"stand-in", totalGlobalMem=memory, **found, **bus)


def cudaDeviceGetPCIBusId(length: int, device: int) -> tuple[cudaError_t, bytes]:
    text = ctypes.create_string_buffer(length)
    return cudaError_t(_library.cudaDeviceGetPCIBusId(text, length, device)), text.value


def cudaGetErrorString(error: int) -> tuple[cudaError_t, bytes]:
    _library.cudaGetErrorString.restype = c_char_p
    return cudaError_t.cudaSuccess, _library.cudaGetErrorString(int(error))


def note(text: str) -> None:
    """Not CUDA's: write a line into the stand-in's log."""
    _library.standin_note(text.encode())
