"""What the numbers were measured on, and who else was using it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hart_runtime.bench import gpu, jetson

LIBRARIES = (
    "hart-runtime",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
)
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
NOTICEABLE = 0.05
"""Share of the machine that other processes may use without being mentioned."""

Facts = dict[str, Any]


def describe_machine(index: int = 0) -> Facts:
    """What does not change during a run: processor, memory, system, libraries, GPU, Jetson board.

    Args:
        index: of the GPU among those that CUDA sees.
    """
    facts: Facts = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": _libraries(),
    }
    if found := gpu.describe(index):
        facts["gpu"] = found
    if board := jetson.describe(Path("/")):
        facts["jetson"] = board
    return facts


def read_state(index: int = 0) -> Facts:
    """What may change during a run: clocks, temperature, power limit, throttling."""
    frequency = psutil.cpu_freq()
    state: Facts = {"cpu_mhz": round(frequency.current) if frequency else None}
    if found := gpu.read_state(index):
        state["gpu"] = found
    if clocks := jetson.read_clocks(Path("/")):
        state["jetson"] = clocks
    return state


@dataclass
class Company:
    """Filled when a run is over: how busy other processes kept the machine meanwhile."""

    cores_used: float = 0.0
    """Mean number of cores that processes other than this one (and its children) kept busy."""
    cores: int = 1
    gpu_processes: int = 0
    """Most compute processes seen on the GPU before or after, this one included."""

    def warning(self) -> str | None:
        """A sentence when somebody else used the machine."""
        found = []
        if self.cores_used > NOTICEABLE * self.cores:
            found.append(f"{self.cores_used:.1f} of {self.cores} cores")
        if self.gpu_processes > 1:
            found.append("the GPU")
        return f"other processes used {' and '.join(found)} meanwhile" if found else None


@contextlib.contextmanager
def watch_company(index: int = 0) -> Iterator[Company]:
    """Compare the system's busy time with our own while the block runs."""
    company = Company(cores=psutil.cpu_count() or 1)
    seen = gpu.count_processes(index)
    busy, own, start = _busy(), _own(), time.perf_counter()
    yield company
    elapsed = time.perf_counter() - start
    company.cores_used = max(0.0, (_busy() - busy) - (_own() - own)) / elapsed
    company.gpu_processes = max(seen, gpu.count_processes(index))


def _busy() -> float:
    """Seconds all cores together were not idle (guest time is part of user time already)."""
    times = psutil.cpu_times()._asdict()
    return sum(seconds for kind, seconds in times.items() if kind in BUSY)


def _own() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _cpu_model() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return named.group(1) if named else platform.processor() or platform.machine()


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
