"""Sustained drawing: pictures for minutes without a pause, and what the machine makes of it.

Short measurements are of a cool machine. Here each minute has percentiles of its own beside temperature,
clocks, what held them down, and energy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from hart_runtime.bench.energy import Meter, find_meter
from hart_runtime.bench.machine import Company, Facts, describe_machine, read_state, watch_company
from hart_runtime.bench.samples import Samples
from hart_runtime.bench.workload import drawing
from hart_runtime.common.errors import InputError, whole_in_range
from hart_runtime.runtime.backends.names import AUTO, parse_device
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.pipeline import Pipeline

SUSTAINED_FILE, MINUTE, BETWEEN_LOOKS = "sustained.json", 60.0, 1.0
SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal")
"""Where systems tell the temperature of a processor."""


@dataclass(frozen=True)
class Look:
    """The machine at one moment."""

    at: float
    """Seconds since the first picture began."""
    mhz: float | None
    """Of what draws: the GPU's cores, or the processor's."""
    celsius: float | None
    slowed_by: tuple[str, ...]
    joules: float | None
    """Since the first picture began."""


@dataclass(frozen=True)
class Minute:
    """Pictures that were whole within one minute."""

    begins: float
    pictures: int
    p50: float
    """Seconds from prompt to pixels, of one batch."""
    p99: float
    mhz: float | None
    """The lowest that was seen."""
    celsius: float | None
    """The highest."""
    slowed_by: tuple[str, ...]
    watts: float | None
    joules_per_picture: float | None


@dataclass(frozen=True)
class Sustained:
    """Everything in ``sustained.json``."""

    date: str
    bundle: dict[str, Any]
    device: str
    backend: str
    batch: int
    seconds: float
    machine: Facts
    company: Company
    energy_of: str | None
    """What energy is measured, in words; None where nothing tells."""
    minutes: tuple[Minute, ...]
    drawn: tuple[tuple[float, float], ...]
    """When each batch was whole, and how long it took."""
    looks: tuple[Look, ...]
    schema: int = field(default=1)


def sustain(
    folder: Path,
    seconds: float,
    device: str = AUTO,
    backend_name: str = AUTO,
    batch: int = 1,
    threads: int | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Sustained:
    """Draw one batch after the other for so many seconds; one at least, and the last is waited for.

    Raises:
        InputError: the bundle cannot be opened, or another such run goes on on this machine.
    """
    with alone():
        bundle = open_bundle(folder)
        whole_in_range("batches", batch, 1, bundle.manifest.max_batch, " (the bundle's maximum)")
        backend = open_backend(bundle, device, threads, backend_name)
        device = backend.device if device == AUTO else device
        _, index = parse_device(device)
        draw = drawing(Pipeline(bundle, backend, threads), batch)
        told("the first picture, which is not counted")
        draw()
        meter = find_meter(backend.device, index)
        with watch_company(index) as company, looking(meter, backend.device, index) as looks:
            drawn = _draw(draw, seconds, told)
    manifest = bundle.manifest
    return Sustained(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        bundle={"name": manifest.name, "identity": bundle.identity, "precision": manifest.precision},
        device=backend.device,
        backend=backend.name,
        batch=batch,
        seconds=drawn[-1][0],
        machine=describe_machine(index),
        company=company,
        energy_of=meter.name if meter else None,
        minutes=by_minute(drawn, looks, batch),
        drawn=tuple(drawn),
        looks=tuple(looks),
    )


def _draw(
    draw: Callable[[], object], seconds: float, told: Callable[[str], None]
) -> list[tuple[float, float]]:
    drawn: list[tuple[float, float]] = []
    began = now = time.perf_counter()
    while now - began < seconds:
        draw()
        before, now = now, time.perf_counter()
        drawn.append((now - began, now - before))
        told(f"{now - began:.0f} of {seconds:.0f} s, {drawn[-1][1]:.2f} s a batch")
    return drawn


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Refuse a second run beside one that goes on: each would measure the other."""
    file = Path(tempfile.gettempdir()) / f"hart-bench-sustained-{os.getuid()}.lock"
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("`sustained`: another such run goes on here; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def looking(meter: Meter | None, device: str, index: int) -> Iterator[list[Look]]:
    """Look at the machine every second while the block runs, and at its end."""
    looks: list[Look] = []
    began, over = time.perf_counter(), threading.Event()
    first = meter.joules() if meter else 0.0

    def look() -> None:
        joules = meter.joules() - first if meter else None
        looks.append(Look(time.perf_counter() - began, *state(device, index), joules))

    def go_on() -> None:
        while not over.wait(BETWEEN_LOOKS):
            look()

    look()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()
        look()


def state(device: str, index: int) -> tuple[float | None, float | None, tuple[str, ...]]:
    """MHz, degrees and what holds the clocks down, of what draws, as far as it can be read."""
    found = read_state(index)
    graphics, board = found.get("gpu") or {}, found.get("jetson") or {}
    if device == "cpu":
        return found.get("cpu_mhz"), _cpu_celsius(), ()
    mhz = graphics.get("graphics_mhz") or board.get("gpu_mhz")
    return mhz, graphics.get("celsius"), tuple(graphics.get("slowed_by", ()))


def _cpu_celsius() -> float | None:
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    found = [entry.current for name in SENSORS for entry in sensors.get(name, ())]
    return max(found, default=None)


def by_minute(
    drawn: Sequence[tuple[float, float]], looks: Sequence[Look], batch: int, length: float = MINUTE
) -> tuple[Minute, ...]:
    """What belongs to each minute; one in which no batch became whole is left out.

    Args:
        drawn: when each batch was whole, and how long it took, in seconds.
        length: of a minute, in seconds.
    """
    minutes = []
    for number in range(int(drawn[-1][0] // length) + 1):
        begins, ends = number * length, (number + 1) * length
        taken = [seconds for at, seconds in drawn if begins <= at < ends]
        if not taken:
            continue
        seen = [look for look in looks if begins <= look.at < ends]
        samples, pictures = Samples.of(taken), len(taken) * batch
        power = _watts(seen)
        spent = min(ends, drawn[-1][0]) - begins
        minutes.append(
            Minute(
                begins=begins,
                pictures=pictures,
                p50=samples.p50,
                p99=samples.p99,
                mhz=min((look.mhz for look in seen if look.mhz is not None), default=None),
                celsius=max((look.celsius for look in seen if look.celsius is not None), default=None),
                slowed_by=tuple(dict.fromkeys(word for look in seen for word in look.slowed_by)),
                watts=power,
                joules_per_picture=None if power is None else power * spent / pictures,
            )
        )
    return tuple(minutes)


def _watts(seen: Sequence[Look]) -> float | None:
    """Between the first and the last look of a minute."""
    known = [(look.at, look.joules) for look in seen if look.joules is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return None
    (first, low), (last, high) = known[0], known[-1]
    return (high - low) / (last - first)


def write_sustained(found: Sustained, folder: Path) -> None:
    """Write ``sustained.json``."""
    text = json.dumps(asdict(found), indent=1, allow_nan=False) + "\n"
    (folder / SUSTAINED_FILE).write_text(text, encoding="utf-8")
