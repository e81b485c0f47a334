"""What the host does while a device draws: the loop over graphs that return at once.

``python -m hart_runtime.bench.host``. A device that computes faster than this waits for the host. No
weights and no GPU are needed: memory plan, uploads and random numbers depend on a model's sizes alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.console import command
from hart_runtime.common.precisions import FP16
from hart_runtime.common.settings import settings_of
from hart_runtime.hart.random_checkpoint import read_shape
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.drawer import Drawer
from hart_runtime.runtime.families.hart import NAME, describe_model
from hart_runtime.runtime.manifest import manifest_of
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.host import HostMemory, array_at
from hart_runtime.runtime.memory.planned import PlannedBackend


class NoGraphs(HostMemory):
    """An executor whose graphs return at once, see :class:`hart_runtime.runtime.memory.executor.Executor`."""

    name = "none"

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        if "image" in bindings:  # one flat colour would be refused
            array_at(bindings["image"]).flat[0] = 1


@command()
@click.option("--shape", default="hart-0.7b-1024px", show_default=True, metavar="NAME|FILE")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="For random numbers. [default: all cores]")
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True)
def main(shape: str, batch: int, threads: int | None, iterations: int) -> None:
    """Time the loop's own work for one batch, in memory of the host."""
    sizes = read_shape(shape)
    settings = settings_of({"steps": sizes.llm.num_sampling_steps, **sizes.sampling}, shape)
    model = describe_model(sizes.llm, sizes.tokenizer, sizes.llm.patch_nums)
    manifest = manifest_of(NAME, model, FP16, max_batch=batch)
    backend = PlannedBackend(Bundle(Path(), manifest, ""), NoGraphs())
    features = np.zeros((batch, model.context_token, model.context_dim), np.float32)
    mask = np.ones((batch, model.context_token), np.bool_)
    drawer = Drawer(manifest, backend, threads)
    given = {"features": features, "mask": mask}
    times = []
    for number in range(-2, iterations):  # the first two plan, and touch the memory
        seeds = [(number + 2) * batch + i for i in range(batch)]
        start = time.perf_counter()
        drawer(given, seeds, settings)
        times.append((time.perf_counter() - start) * 1000)
    drawn = times[2:]
    click.echo(
        f"{shape}: {statistics.median(drawn):.1f} ms of host time for {batch} picture(s) of "
        f"{model.image_size} x {model.image_size} px (from {min(drawn):.1f} to {max(drawn):.1f})"
    )


if __name__ == "__main__":
    main()
