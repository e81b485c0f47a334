"""What is said of a GPU and its board: which GPU NVML is asked about, and a Jetson's own files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hart_runtime.bench import gpu, jetson
from hart_runtime.bench.machine import describe_machine
from hart_runtime.runtime.memory.gpu import pci_bus_id, shares_memory
from tests.strict import install_cuda
from tests.strict.device import ORIN, Card

FAST_IN_A_LATE_SLOT = (Card("NVIDIA H200", (9, 0), bus=0x9A), Card("NVIDIA T4", (7, 5), bus=0x17))
"""In CUDA's order, fastest first; NVML's is that of the slots."""


class NVMLError(Exception):
    pass


def install_nvml(patch: pytest.MonkeyPatch, slots: dict[str, str], lacks: tuple[str, ...] = ()) -> None:
    """An NVML that knows GPUs by their PCI address, and has no answer to some questions.

    Args:
        slots: name of the GPU by address.
    """
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = NVMLError, 1, 2, 0
    in_order = sorted(slots)

    def by_place(place: str) -> str:
        if place not in slots:
            raise NVMLError("Not Found")
        return place

    answers: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(slots),
        "nvmlDeviceGetHandleByIndex": lambda index: in_order[index],
        "nvmlDeviceGetHandleByPciBusId": by_place,
        "nvmlDeviceGetName": lambda place: slots[place],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
    }

    def silent(*_: Any) -> Any:
        raise NVMLError("Not Supported")

    def ask(name: str) -> Any:
        if name.startswith("nvmlClocksEventReason"):
            return 1
        return silent if name in lacks else answers.get(name, silent)

    nvml.__getattr__ = ask
    patch.setitem(sys.modules, "pynvml", nvml)


def test_the_gpu_that_cuda_means_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda(monkeypatch, FAST_IN_A_LATE_SLOT)
    install_nvml(monkeypatch, {"0000:17:00.0": "NVIDIA T4", "0000:9A:00.0": "NVIDIA H200"})
    for index, card in enumerate(FAST_IN_A_LATE_SLOT):
        assert (gpu.describe(index) or {})["name"] == card.name
        assert describe_machine(index)["gpu"]["name"] == card.name
    assert gpu.describe(2) is None
    assert gpu.memory_used(0) is None
    assert gpu.count_processes(0) == 0


def test_what_nvml_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's has no PCI address, and may lack the driver's version."""
    install_cuda(monkeypatch, (ORIN,))
    install_nvml(monkeypatch, {"0": "Orin (nvgpu)"}, lacks=("nvmlSystemGetDriverVersion",))
    found = gpu.describe()
    assert found == {
        "name": "Orin (nvgpu)",
        "compute_capability": None,
        "driver": None,
        "memory_bytes": None,
    }
    assert (gpu.read_state() or {})["slowed_by"] == []
    install_nvml(monkeypatch, {}, lacks=("nvmlInit",))
    assert (gpu.describe(), gpu.read_state(), gpu.memory_used()) == (None, None, None)
    install_nvml(monkeypatch, {"1": "A", "2": "B"})
    assert gpu.describe() is None, "two, and none of them known by its place"


def test_without_a_gpu_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda(monkeypatch, ())
    install_nvml(monkeypatch, {"0000:17:00.0": "hidden from CUDA"})
    assert gpu.describe() is None
    assert (pci_bus_id(), shares_memory()) == (None, False)


def test_memory_of_its_own_or_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda(monkeypatch, (Card(), ORIN))
    assert [shares_memory(index) for index in range(2)] == [False, True]


def jetson_files(root: Path) -> None:
    """Those of JetPack 6, as far as they are read."""
    clock = root / "sys/devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu"
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0002\n",
        str(clock / "cur_freq"): "306000000\n",
        str(clock / "max_freq"): "1020000000\n",
        "sys/devices/platform/bus@0/13e00000.host1x/devfreq/15480000.nvdec/cur_freq": "115200000\n",
    }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_jetson_says_what_it_is(tmp_path: Path) -> None:
    assert jetson.describe(tmp_path) is None
    assert jetson.read_clocks(tmp_path) is None
    jetson_files(tmp_path)
    board = {
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "linux": "36.4.3",
        "power_mode": "MAXN_SUPER",
        "gpu_max_mhz": 1020,
    }
    assert jetson.describe(tmp_path) == board
    assert jetson.read_clocks(tmp_path) == {"gpu_mhz": 306}
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert jetson.describe(tmp_path) == board | {"power_mode": "2"}


def test_a_jetson_whose_power_mode_only_its_tool_knows(tmp_path: Path) -> None:
    jetson_files(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    assert (jetson.describe(tmp_path) or {})["power_mode"] is None
    tool = tmp_path / "usr/sbin/nvpmodel"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\ntest "$1" = -q && echo "NV Power Mode: 15W" && echo 0\n')
    tool.chmod(0o755)
    assert (jetson.describe(tmp_path) or {})["power_mode"] == "15W"
