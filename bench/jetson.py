"""What a Jetson board says of itself, in its own files: NVIDIA's management library tells little there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GPU = re.compile(r"\.(gpu|ga10b|gv11b|gp10b|gm20b)$")
"""How the folder of the GPU's clock ends, by chip and system."""
CLOCKS = ("*/devfreq/*", "platform/*/devfreq/*", "platform/*/*/devfreq/*")
"""Where that folder is below /sys/devices."""
SECONDS = 10.0
"""How long the tool for power modes may take."""


def describe(root: Path) -> dict[str, Any] | None:
    """Model, release of its Linux, power mode and the highest clock of the GPU; None elsewhere.

    Args:
        root: of the file system.
    """
    model = _text(root / "proc/device-tree/model").strip("\0\n ")
    release = _text(root / "etc/nv_tegra_release")
    if not release and "jetson" not in model.lower() and "orin" not in model.lower():
        return None
    numbers = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    return {
        "model": model or None,
        "linux": f"{numbers[1]}.{numbers[2]}" if numbers else None,
        "power_mode": _power_mode(root),
        "gpu_max_mhz": _clock(root, "max_freq"),
    }


def read_clocks(root: Path) -> dict[str, Any] | None:
    """MHz of the GPU now; None where no file tells."""
    now = _clock(root, "cur_freq")
    return None if now is None else {"gpu_mhz": now}


def _power_mode(root: Path) -> str | None:
    """Its name, or its number where no file names it."""
    status = re.search(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if status is None:
        named = re.search(r"Power Mode: *(\S+)", _asked(root / "usr/sbin/nvpmodel"))
        return named[1] if named else None
    entry = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
    names = dict(entry.findall(_text(root / "etc/nvpmodel.conf")))
    return names.get(status[1], status[1])


def _asked(tool: Path) -> str:
    """What the tool for power modes says, nothing where it is not there or not allowed to."""
    try:
        asked = subprocess.run(
            [tool, "-q"],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout


def _clock(root: Path, file: str) -> int | None:
    """MHz in a file of the GPU's clock."""
    for folder in _clock_folders(root / "sys/devices"):
        if (text := _text(folder / file).strip()).isdecimal():
            return round(int(text) / 1e6)
    return None


def _clock_folders(devices: Path) -> Iterator[Path]:
    for pattern in CLOCKS:
        yield from (folder for folder in sorted(devices.glob(pattern)) if GPU.search(folder.name))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
