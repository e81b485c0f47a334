"""Which GPU there is, what it is, and why there is none: through cuda-python."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any

from hart_runtime.common.errors import InputError, RunError, named, parameter
from hart_runtime.common.install import pip
from hart_runtime.runtime.backends.names import CPU, CUDA

INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100
"""Statuses of CUDA."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
PCI_ID_LENGTH = 32
"""Bytes of room for an identifier such as 0000:01:00.0."""
NEWEST_OF_12 = (
    "'cuda-bindings<13' (and of these what is used: 'onnxruntime-gpu[cuda,cudnn]<1.27', tensorrt-cu12, "
    "tensorrt-rtx-cu12)"
)
"""What runs with drivers of CUDA 12, as pip is told."""


class NoGpuError(InputError):
    """This machine has no GPU, which is nothing to tell somebody who did not ask for one."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as far as programs that were built for its model depend on it."""

    name: str
    """As its driver spells it."""
    capability: str
    """Compute capability, such as "8.9"."""
    multiprocessors: int
    memory: int
    """Bytes."""

    def is_like(self, other: Gpu) -> bool:
        """Whether what was built on one is for the other: drivers differ a little in the memory they tell."""
        same = (self.name, self.capability, self.multiprocessors)
        alike = same == (other.name, other.capability, other.multiprocessors)
        return alike and abs(self.memory - other.memory) < 0.05 * self.memory

    def __str__(self) -> str:
        return f"{named(self.name)} ({self.multiprocessors} multiprocessors, {self.memory / 1e9:.1f} GB)"


def cuda() -> Any:
    """The runtime bindings of cuda-python.

    Raises:
        NoGpuError: there is no driver either.
        InputError: they are not installed, or cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        if not _driver_is_there():
            raise NoGpuError(_no_gpu("no NVIDIA driver is installed")) from None
        raise InputError(
            f"cuda-python cannot be loaded ({error}); install it with: {pip()} install cuda-bindings"
        ) from None
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """Value of a CUDA call.

    Raises:
        RunError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise RunError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def find_gpu(index: int = 0) -> Gpu:
    """A GPU by its number among those that CUDA sees.

    Raises:
        NoGpuError: there is none.
        InputError: there are, but not this one; the driver is older than the libraries; no cuda-python.
    """
    api = cuda()
    count = _count(api)
    if index >= count:
        there = "; ".join(f"{CUDA}:{i} is {_properties(api, i)}" for i in range(count))
        raise InputError(f"{parameter('device', f'{CUDA}:{index}')}: there is no such GPU, {there}")
    return _properties(api, index)


def present_gpu(index: int = 0) -> Gpu | None:
    """The same without a reason: None where it cannot be used."""
    try:
        return find_gpu(index)
    except (InputError, RunError):
        return None


def count_gpus() -> int:
    """How many CUDA sees; 0 where none can be used."""
    try:
        return _count(cuda())
    except (InputError, RunError):
        return 0


def is_there() -> bool:
    """Whether this machine has a GPU at all, be it one that cannot be used."""
    try:
        find_gpu()
    except NoGpuError:
        return False
    except (InputError, RunError):
        pass
    return True


def pci_bus_id(index: int = 0) -> str | None:
    """Where a GPU is plugged in, such as "0000:01:00.0"; None where it cannot be used.

    Libraries that know nothing of CUDA number GPUs in their own order, and all know them by this.
    """
    if present_gpu(index) is None:
        return None
    status, found = cuda().cudaDeviceGetPCIBusId(PCI_ID_LENGTH, index)
    return None if int(status) != 0 else str(found.decode().partition("\0")[0].strip())


def shares_memory(index: int = 0) -> bool:
    """Whether a GPU has no memory of its own, but works in the CPU's, as on a Jetson."""
    if present_gpu(index) is None:
        return False
    return bool(check(cuda().cudaGetDeviceProperties(index)).integrated)


def _count(api: Any) -> int:
    """How many there are, one at least."""
    status, count = api.cudaGetDeviceCount()
    if int(status) == INSUFFICIENT_DRIVER:
        driver = _version(api.cudaDriverGetVersion())
        if driver == (0, 0):
            raise NoGpuError(_no_gpu("no NVIDIA driver answers"))
        raise InputError(old_driver("cuda-bindings", driver, _version(api.cudaRuntimeGetVersion())))
    if int(status) == NO_DEVICE or (int(status) == 0 and count == 0):
        hidden = os.environ.get(VISIBLE)
        raise NoGpuError(
            _no_gpu(f"{VISIBLE} is {hidden!r}" if hidden is not None else "the driver sees none")
        )
    if int(status) != 0:
        raise InputError(
            f"CUDA cannot be used: {status.name}; `nvidia-smi` should list the GPU, "
            f"or use {parameter('device', CPU)}"
        )
    return int(count)


def old_driver(library: str, driver: tuple[int, int], wanted: tuple[int, int]) -> str:
    """The sentence for a driver that is older than a library."""
    return (
        f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]}, {library} is for CUDA "
        f"{wanted[0]}.{wanted[1]}: update the driver, or install what it runs with: "
        f"{pip()} install {NEWEST_OF_12}"
    )


def driver_version() -> tuple[int, int]:
    """CUDA version of the driver, such as (12, 4)."""
    return _version(cuda().cudaDriverGetVersion())


def _version(answer: tuple[Any, int]) -> tuple[int, int]:
    status, number = answer
    return (0, 0) if int(status) != 0 else (int(number) // 1000, int(number) % 1000 // 10)


def _properties(api: Any, index: int) -> Gpu:
    found = check(api.cudaGetDeviceProperties(index))
    name = found.name.decode(errors="replace") if isinstance(found.name, bytes) else str(found.name)
    return Gpu(
        name=name.strip("\0 "),
        capability=f"{found.major}.{found.minor}",
        multiprocessors=int(found.multiProcessorCount),
        memory=int(found.totalGlobalMem),
    )


def _no_gpu(reason: str) -> str:
    return f"found no CUDA GPU ({reason}); use {parameter('device', CPU)}"


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
