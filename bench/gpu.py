"""The GPU as NVIDIA's management library sees it; every answer is None on machines without one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    """The GPU that CUDA calls device 0, and the library to ask about it."""

    nvml: Any
    handle: Any

    def ask(self, question: str, *arguments: Any) -> Any:
        """One answer, None where this GPU or driver does not tell."""
        try:
            return getattr(self.nvml, question)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None


def describe() -> dict[str, Any] | None:
    """What does not change during a run."""
    with _open() as gpu:
        if gpu is None:
            return None
        return {
            "name": gpu.ask("nvmlDeviceGetName"),
            "compute_capability": gpu.ask("nvmlDeviceGetCudaComputeCapability"),
            "driver": gpu.nvml.nvmlSystemGetDriverVersion(),
            "memory_bytes": getattr(gpu.ask("nvmlDeviceGetMemoryInfo"), "total", None),
        }


def read_state() -> dict[str, Any] | None:
    """Clocks, power limit, temperature, and what holds the clocks down."""
    with _open() as gpu:
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


def memory_used() -> int | None:
    """Bytes in use on the GPU, by anybody."""
    with _open() as gpu:
        return None if gpu is None else getattr(gpu.ask("nvmlDeviceGetMemoryInfo"), "used", None)


def count_processes() -> int:
    """Processes that compute on the GPU now."""
    with _open() as gpu:
        return 0 if gpu is None else len(gpu.ask("nvmlDeviceGetComputeRunningProcesses") or [])


@contextlib.contextmanager
def _open() -> Iterator[_Gpu | None]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        if chosen.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(chosen))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(chosen)
        yield _Gpu(pynvml, handle)
    except pynvml.NVMLError:  # no such device
        yield None
    finally:
        pynvml.nvmlShutdown()
