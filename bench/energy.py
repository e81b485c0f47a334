"""Joules: of a GPU by NVML's counter, of a Jetson by its power rails, of a processor by RAPL.

Rails and RAPL are files; each meter is given the root of the file system, so that recorded ones do as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hart_runtime.bench import gpu
from hart_runtime.runtime.backends.names import CPU

WHOLE = ("VDD_IN", "POM_5V_IN")
"""Rails that feed all others: where one is there, it is all that the board takes."""
HWMON, IIO = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221x/*/iio:device*"
"""Where the power monitors of Jetson boards are, of JetPack 5 and newer, and older."""
RAPL = "sys/class/powercap/intel-rapl:*"


class Meter(Protocol):
    """Counts joules from when it was made; what is read later is never less."""

    @property
    def name(self) -> str:
        """What is measured, in words."""

    def joules(self) -> float:
        """So far. Meters of power want to be read every second."""


@dataclass
class Counters:
    """Counters in files, in microjoules, each of which begins anew beyond its largest value."""

    name: str
    files: dict[Path, float]
    """With the largest value of each."""
    taken: float = 0.0
    last: dict[Path, float] = field(default_factory=dict)

    def joules(self) -> float:
        for file, largest in self.files.items():
            now = _number(file)
            if now is None:
                continue
            before = self.last.get(file, now)
            self.taken += now - before + (largest if now < before else 0.0)
            self.last[file] = now
        return self.taken / 1e6


@dataclass
class Power:
    """What power is at moments, taken to change evenly between them."""

    name: str
    watts: Callable[[], float | None]
    clock: Callable[[], float] = time.monotonic
    taken: float = 0.0
    last: tuple[float, float] | None = None

    def joules(self) -> float:
        now, watts = self.clock(), self.watts()
        if watts is not None:
            if self.last is not None:
                then, before = self.last
                self.taken += (now - then) * (watts + before) / 2
            self.last = now, watts
        return self.taken


@dataclass
class GpuCounter:
    """NVML's, of one GPU since its driver was loaded."""

    index: int
    first: float
    name: str = "the GPU, by NVML"
    taken: float = 0.0

    def joules(self) -> float:
        now = gpu.millijoules(self.index)
        if now is not None:
            self.taken = max(self.taken, (now - self.first) / 1e3)
        return self.taken


def find_meter(device: str, index: int = 0, root: Path = Path("/")) -> Meter | None:
    """What tells the energy of drawing on a device; None where nothing may be read.

    Args:
        index: of the GPU among those that CUDA sees.
        root: of the file system.
    """
    if rails := jetson_rails(root):
        names = ", ".join(rails)
        meter: Meter = Power(f"the board, by its rails {names}", lambda: _watts(rails))
    elif device != CPU:
        first = gpu.millijoules(index)
        if first is None:
            return None
        meter = GpuCounter(index, first)
    elif packages := rapl_packages(root):
        meter = Counters("the processor, by RAPL", packages)
    else:
        return None
    meter.joules()
    return meter


def rapl_packages(root: Path) -> dict[Path, float]:
    """Counters of whole processors, those that may be read, with their largest values."""
    found = {}
    for folder in sorted(root.glob(RAPL)):
        counter, largest = folder / "energy_uj", _number(folder / "max_energy_range_uj")
        package = _text(folder / "name").startswith("package")
        if package and largest is not None and _number(counter) is not None:
            found[counter] = largest
    return found


Rail = Callable[[], float | None]


def jetson_rails(root: Path) -> dict[str, Rail]:
    """What tells the watts of each power rail, by its name: of all that the board takes, once."""
    found: dict[str, Rail] = {}
    for folder in sorted(root.glob(HWMON)):
        for label in sorted(folder.glob("in*_label")):
            number = label.name[2 : -len("_label")]
            volts, amperes = folder / f"in{number}_input", folder / f"curr{number}_input"
            if _number(volts) is not None and _number(amperes) is not None:  # a sum has no current of its own
                found[_text(label)] = _product(volts, amperes)
    for folder in sorted(root.glob(IIO)):
        for label in sorted(folder.glob("rail_name_*")):
            milliwatts = folder / f"in_power{label.name.rpartition('_')[2]}_input"
            if _number(milliwatts) is not None:
                found[_text(label)] = _thousandth(milliwatts)
    whole = {name: rail for name, rail in found.items() if name in WHOLE}
    return whole or {name: rail for name, rail in found.items() if name != "NC"}


def _product(millivolts: Path, milliamperes: Path) -> Rail:
    def watts() -> float | None:
        volts, amperes = _number(millivolts), _number(milliamperes)
        return None if volts is None or amperes is None else volts * amperes / 1e6

    return watts


def _thousandth(milliwatts: Path) -> Rail:
    def watts() -> float | None:
        value = _number(milliwatts)
        return None if value is None else value / 1e3

    return watts


def _watts(rails: dict[str, Rail]) -> float | None:
    values = [rail() for rail in rails.values()]
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _number(file: Path) -> float | None:
    try:
        return float(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # not there, or for root alone
        return ""
