"""A GPU as NVIDIA's management library sees it; every answer is None where there is no GPU or no library.

A GPU is given by its number among those that CUDA sees. The library numbers them otherwise (by their place,
and none is hidden from it), so that it is asked by that place, which CUDA tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hart_runtime.runtime.memory.gpu import pci_bus_id

PREFIX = "nvmlClocksEventReason"
SLOWED = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "temperature",
    "HwThermalSlowdown": "temperature (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
}
"""Reasons for low clocks, as NVML names them, that make a measurement unfair."""


@dataclass(frozen=True)
class _Gpu:
    """A GPU, and the library to ask about it."""

    nvml: Any
    handle: Any

    def ask(self, question: str, *arguments: Any) -> Any:
        """One answer, None where this GPU or driver does not tell."""
        try:
            return getattr(self.nvml, question)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def driver(self) -> str | None:
        try:
            return str(self.nvml.nvmlSystemGetDriverVersion())
        except self.nvml.NVMLError:
            return None


def describe(index: int = 0) -> dict[str, Any] | None:
    """What does not change during a run."""
    with _open(index) as gpu:
        if gpu is None:
            return None
        return {
            "name": gpu.ask("nvmlDeviceGetName"),
            "compute_capability": gpu.ask("nvmlDeviceGetCudaComputeCapability"),
            "driver": gpu.driver(),
            "memory_bytes": getattr(gpu.ask("nvmlDeviceGetMemoryInfo"), "total", None),
        }


def read_state(index: int = 0) -> dict[str, Any] | None:
    """Clocks, power limit, temperature, and what holds the clocks down."""
    with _open(index) as gpu:
        if gpu is None:
            return None
        reasons = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return {
            "graphics_mhz": gpu.ask("nvmlDeviceGetClockInfo", gpu.nvml.NVML_CLOCK_SM),
            "memory_mhz": gpu.ask("nvmlDeviceGetClockInfo", gpu.nvml.NVML_CLOCK_MEM),
            "power_limit_milliwatts": gpu.ask("nvmlDeviceGetEnforcedPowerLimit"),
            "celsius": gpu.ask("nvmlDeviceGetTemperature", gpu.nvml.NVML_TEMPERATURE_GPU),
            "slowed_by": [
                words for name, words in SLOWED.items() if reasons & getattr(gpu.nvml, PREFIX + name)
            ],
        }


def millijoules(index: int = 0) -> int | None:
    """What the GPU has taken since its driver was loaded."""
    with _open(index) as gpu:
        return None if gpu is None else gpu.ask("nvmlDeviceGetTotalEnergyConsumption")


def memory_used(index: int = 0) -> int | None:
    """Bytes in use on the GPU, by anybody."""
    with _open(index) as gpu:
        return None if gpu is None else getattr(gpu.ask("nvmlDeviceGetMemoryInfo"), "used", None)


def count_processes(index: int = 0) -> int:
    """Processes that compute on the GPU now."""
    with _open(index) as gpu:
        return 0 if gpu is None else len(gpu.ask("nvmlDeviceGetComputeRunningProcesses") or [])


@contextlib.contextmanager
def _open(index: int) -> Iterator[_Gpu | None]:
    import pynvml

    place = pci_bus_id(index)
    if place is None:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # not installed, as on a Jetson
        yield None
        return
    try:
        yield _find(pynvml, place)
    finally:
        pynvml.nvmlShutdown()


def _find(nvml: Any, place: str) -> _Gpu | None:
    """The GPU at a PCI address; one that is part of the processor has none that the library knows."""
    try:
        return _Gpu(nvml, nvml.nvmlDeviceGetHandleByPciBusId(place))
    except nvml.NVMLError:
        pass
    try:
        return _Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(0)) if nvml.nvmlDeviceGetCount() == 1 else None
    except nvml.NVMLError:
        return None
