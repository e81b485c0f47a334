"""What the host does while a device draws, and how long a fast device waits for it.

``python -m hart_runtime.bench.host``. No weights and no GPU are needed: memory plan, uploads and random
numbers depend on a model's sizes alone. Graphs compute nothing; the device is a clock.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.checkpoint import LLM, TOKENIZER
from hart_runtime.common.console import command
from hart_runtime.common.precisions import FP16
from hart_runtime.common.settings import settings_of
from hart_runtime.hart.random_checkpoint import read_shape
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.drawer import Drawer
from hart_runtime.runtime.families.hart import NAME, describe_model
from hart_runtime.runtime.families.names import CONTEXT, DECODER, NEXT_SCALE
from hart_runtime.runtime.manifest import Manifest, manifest_of
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.host import HostMemory, array_at
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.pipeline import to_images
from hart_runtime.runtime.png import Origin, PngWriter
from hart_runtime.runtime.shapes import solve
from hart_runtime.runtime.work import work_of

OPERATIONS, BYTES = 790e12, 4.8e12
"""What an H200 does in a second: dense products in 16 bits as measured, memory as its maker says."""


class Clock(HostMemory):
    """A device that computes nothing, see :class:`hart_runtime.runtime.memory.executor.Executor`.

    A graph that is asked for at some time starts then, or when the one before it is done, and takes as long
    as its operations or its bytes need at an H200's rates; or no time at all.
    """

    name = "clock"

    def __init__(self, manifest: Manifest, instant: bool) -> None:
        super().__init__()
        self.manifest, self.sizes, self.instant = manifest, manifest.sizes, instant
        self.taken: dict[int, float] = {}
        self.until = self.busy = self.waited = 0.0
        self.copied = self.downloads = 0
        self.drawing = False

    def restart(self) -> None:
        """Forget what the pictures before took."""
        self.busy = self.waited = 0.0
        self.copied = self.downloads = 0

    def discard(self, address: int, nbytes: int) -> None:
        pass  # as devices do

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        self.copied += array.nbytes
        super().upload(address, array, slot)

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        now = time.perf_counter()
        if self.drawing:
            self.waited += max(0.0, now - self.until)
        seconds = 0.0 if self.instant else self._seconds(graph, bindings, call)
        self.busy += seconds
        self.until = max(now, self.until) + seconds
        # Counted from the end of the first scale on, until the picture.
        self.drawing = graph not in (CONTEXT, DECODER) and (self.drawing or graph == NEXT_SCALE)
        if graph == DECODER:  # one flat colour would be refused
            (picture,) = (b for name, b in bindings.items() if name in self.pictures)
            array_at(picture).flat[0] = 1

    def download(self, binding: Binding) -> NDArray[Any]:
        time.sleep(max(0.0, self.until - time.perf_counter()))
        self.downloads += 1
        return super().download(binding)

    @property
    def pictures(self) -> set[str]:
        """What the decoder returns."""
        return {tensor.name for tensor in self.manifest.graphs[DECODER].outputs}

    def _seconds(self, graph: str, bindings: Mapping[str, Binding], call: int | None) -> float:
        key = hash(graph) if call is None else call
        if key not in self.taken:
            specs = self.manifest.graphs[graph].inputs
            dims = solve(specs, {spec.name: bindings[spec.name].shape for spec in specs})
            work = work_of(self.manifest.contract(graph), self.sizes | dims)
            self.taken[key] = max(work.operations / OPERATIONS, work.bytes / BYTES)
        return self.taken[key]


@command()
@click.option("--shape", default="hart-0.7b-1024px", show_default=True, metavar="NAME|FILE")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="For random numbers. [default: all cores, at most 4]")
@click.option("--iterations", type=click.IntRange(1), default=20, show_default=True)
def main(shape: str, batch: int, threads: int | None, iterations: int) -> None:
    """Time the host's own work for one batch, then how long a device at its floor waits for the host."""
    sizes = read_shape(shape)
    settings = settings_of({"steps": sizes.llm.num_sampling_steps, **sizes.sampling}, shape)
    model = describe_model(sizes.llm, sizes.tokenizer, sizes.llm.patch_nums)
    checkpoint = {LLM: asdict(sizes.llm), TOKENIZER: asdict(sizes.tokenizer)}
    manifest = replace(manifest_of(NAME, model, FP16, batch, settings), checkpoint=checkpoint)
    alone, floor = (_Draws(manifest, instant, batch, threads) for instant in (True, False))
    alone.run(iterations)
    floor.run(iterations)
    size = f"{model.image_size} x {model.image_size} px"
    click.echo(f"{shape}: {batch} picture(s) of {size}, medians of {iterations}")
    click.echo(f"the host's own work{_said(alone.wall)}")
    click.echo(f"a device at its floor is busy for{_said(floor.busy)}")
    click.echo(f"  from the first scale to the picture it waits for the host{_said(floor.waited)}")
    click.echo(f"  the next picture waits for the file of this one{_said(floor.files)}")
    click.echo(f"copied to the device: {alone.copied / batch / 1e6:.1f} MB a picture")
    click.echo(f"copied back at the end, with a wait: {alone.downloads} times a batch")


class _Draws:
    """Pictures on one device, and what they took."""

    def __init__(self, manifest: Manifest, instant: bool, batch: int, threads: int | None) -> None:
        self.clock, self.batch, self.settings = Clock(manifest, instant), batch, manifest.sampling
        backend = PlannedBackend(Bundle(Path(), manifest, ""), self.clock)
        self.drawer = Drawer(manifest, backend, threads)
        model = manifest.model
        features = np.zeros((batch, model.context_token, model.context_dim), np.float32)
        self.given = {"features": features, "mask": np.ones((batch, model.context_token), np.bool_)}
        noise = np.random.default_rng(0).normal(0, 0.02, (batch, 3, model.image_size, model.image_size))
        shade = np.linspace(0.1, 0.9, model.image_size)
        self.picture = (noise + shade).clip(0, 1).astype(np.float32)  # compresses like a photograph
        self.wall: list[float] = []
        self.busy: list[float] = []
        self.waited: list[float] = []
        self.files: list[float] = []
        self.copied = self.downloads = 0

    def run(self, iterations: int) -> None:
        with tempfile.TemporaryDirectory() as folder, PngWriter() as files:
            for number in range(-2, iterations):  # the first two plan, and touch the memory
                if number == 0:
                    for times in (self.wall, self.busy, self.waited, self.files):
                        times.clear()
                self._draw(number + 2, Path(folder), files)

    def _draw(self, number: int, folder: Path, files: PngWriter) -> None:
        clock = self.clock
        clock.restart()
        seeds = [number * self.batch + i for i in range(self.batch)]
        start = time.perf_counter()
        self.drawer(self.given, seeds, self.settings)
        self.wall.append(time.perf_counter() - start)
        self.busy.append(clock.busy)
        self.waited.append(clock.waited)
        self.copied, self.downloads = clock.copied, clock.downloads
        if clock.instant:
            return
        images = to_images(self.picture)
        start = time.perf_counter()
        for seed, image in zip(seeds, images, strict=True):
            files.save(image, folder / f"{seed}.png", Origin("", seed, self.settings, "", ""))
        self.files.append(time.perf_counter() - start)


def _said(seconds: list[float]) -> str:
    milliseconds = [1000 * value for value in seconds]
    low, high = min(milliseconds), max(milliseconds)
    return f": {statistics.median(milliseconds):.1f} ms (from {low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
