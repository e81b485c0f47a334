"""A server in turns with the bundle that it draws with: what serving costs, and if pictures stay the same."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from hart_runtime.bench.load import Load, Measured, Wanted, measure_load
from hart_runtime.bench.samples import Samples
from hart_runtime.bench.workload import drawing, subject
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends.names import AUTO
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.pipeline import Pipeline

SEEDS = 16
"""Of each prompt: what clients ask for in turns, and hart-run has drawn before."""
ROUNDS = 4
"""Of load, with hart-bench's own drawing before each for a fourth of its time, and after the last."""
BEAT = 0.2
"""Seconds between two looks at the server's health."""
RUN = "from hart_runtime.runtime.cli import main; main()"
SERVE = "from hart_runtime.serve.cli import main; main()"


@dataclass(frozen=True)
class Means:
    """What both draw with, see :func:`hart_runtime.runtime.backends.registry.open_backend`."""

    bundle: Path
    device: str = AUTO
    backend: str = AUTO
    threads: int | None = None

    def command(self, code: str, **more: object) -> list[str]:
        """A process that runs a command of ours with these and more options."""
        own = {"engine": self.bundle, "device": self.device, "backend": self.backend, "threads": self.threads}
        given = {name: value for name, value in {**own, **more}.items() if value is not None}
        options = [
            word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        return [sys.executable, "-c", code, *options]


@dataclass(frozen=True)
class SideBySide:
    """All rounds together."""

    measured: Measured
    batch: int
    alone: Samples
    """Seconds that hart-bench's drawing of a batch takes."""
    alone_seconds: float
    """The same of a processor, for each picture; what others do on this machine changes it little."""
    health: Samples
    """Seconds until the server says how it is."""
    server_seconds: float
    """Of a processor, of the process that answers, for each picture."""
    worker_seconds: float
    """The same of the processes that draw."""
    memory: tuple[int, ...]
    """Bytes of all of the server's processes after each round."""

    @property
    def alone_throughput(self) -> float:
        """Pictures a second of hart-bench."""
        return self.batch / self.alone.p50

    @property
    def ratio(self) -> float:
        """The server's throughput over hart-bench's."""
        return self.measured.throughput / self.alone_throughput

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.measured.summary(),
            "hart_bench": {
                "batch": self.batch,
                "pictures_per_second": self.alone_throughput,
                "seconds_per_picture": self.alone_seconds,
            },
            "ratio": self.ratio,
            "health": {"p50": self.health.p50, "p99": self.health.p99},
            "server_seconds_per_picture": self.server_seconds,
            "worker_seconds_per_picture": self.worker_seconds,
            "memory": self.memory,
        }


def measure_side_by_side(load: Load, means: Means) -> SideBySide:
    """Start a server, ask it as the load says (at an address of its own), and draw without it in turns.

    Raises:
        InputError: the bundle cannot be opened or served, or draws from text features alone.
        RunError: it cannot be drawn with.
    """
    bundle = open_bundle(means.bundle)
    if (asked := subject(bundle)) is None:
        raise InputError(f"{means.bundle}: has no text encoder, and clients ask with prompts")
    load = replace(load, prompts=load.prompts or (asked,))
    load = replace(load, wanted=_drawn_by_hart_run(means, load))
    pipeline = Pipeline.load(means.bundle, means.device, means.threads, means.backend)
    batch = min(load.clients * load.pictures, bundle.manifest.max_batch)
    draw = drawing(pipeline, batch)
    draw()
    part = load.seconds / ROUNDS
    alone: list[tuple[float, float]] = []
    rounds: list[Measured] = []
    beats: list[float] = []
    memory: list[int] = []
    spawn = multiprocessing.get_context("spawn")
    with _server(means) as (url, process), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        moments = [moment for moment in load.moments if moment < part]
        load = replace(load, url=url, seconds=part, moments=moments)
        before = _processor_seconds(process)
        for _ in range(ROUNDS):
            alone += _timed(draw, part / 4)
            beating = pool.submit(beat, url, part)
            rounds.append(measure_load(load))
            beats += beating.result()
            memory.append(sum(one.memory_info().rss for one in (process, *process.children())))
        alone += _timed(draw, part / 4)
        spent = [after - was for was, after in zip(before, _processor_seconds(process), strict=True)]
    measured = Measured(load, sum(one.seconds for one in rounds), [a for one in rounds for a in one.answers])
    pictures = max(measured.pictures, 1)
    return SideBySide(
        measured=measured,
        batch=batch,
        alone=Samples.of([wall for wall, _ in alone]),
        alone_seconds=sum(processor for _, processor in alone) / len(alone) / batch,
        health=Samples.of(beats),
        server_seconds=spent[0] / pictures,
        worker_seconds=spent[1] / pictures,
        memory=tuple(memory),
    )


def _drawn_by_hart_run(means: Means, load: Load) -> Mapping[Wanted, bytes]:
    """The files that it writes for every prompt and seed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*means.command(RUN, output=f"{folder}/x.png", num_images=SEEDS), "--", *load.prompts]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"hart-run failed: {done.stderr.strip().rpartition(chr(10))[2]}")
        files = (Path(folder, f"x-{number}.png").read_bytes() for number in range(len(load.prompts) * SEEDS))
        wanted = [(prompt, seed) for prompt in load.prompts for seed in range(SEEDS)]
        return dict(zip(wanted, files, strict=True))


@contextlib.contextmanager
def _server(means: Means) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its process, once it draws; it ends with the block."""
    with tempfile.TemporaryFile("w+") as log:
        command = means.command(SERVE, port=0)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            while not url or _status(url, "/ready") != 200:
                if not url or process.poll() is not None:
                    log.seek(0)
                    raise RunError(f"hart-serve ended: {log.read().strip().rpartition(chr(10))[2]}")
                time.sleep(BEAT)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def _status(url: str, path: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def beat(url: str, seconds: float) -> list[float]:
    """Seconds that each of many looks at a server's health takes; in a process without other threads."""
    found = []
    began = time.perf_counter()
    while (start := time.perf_counter()) - began < seconds:
        if _status(url, "/health") != 200:
            raise RunError("the server does not say how it is")
        found.append(time.perf_counter() - start)
        time.sleep(BEAT)
    return found


def _timed(draw: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """Seconds that each of several drawings takes, of the clock and of a processor; one at least."""
    found: list[tuple[float, float]] = []
    while sum(wall for wall, _ in found) < seconds:
        start, spent = time.perf_counter(), time.process_time()
        draw()
        found.append((time.perf_counter() - start, time.process_time() - spent))
    return found


def _processor_seconds(process: psutil.Process) -> tuple[float, float]:
    """Of the process that answers, and of those that draw."""
    times = [one.cpu_times() for one in (process, *process.children())]
    answers, *draws = (spent.user + spent.system for spent in times)
    return answers, sum(draws)
