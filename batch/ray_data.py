"""Draws a plan on Ray Data: pools of actors that hold pipelines, and one process that writes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from hart_runtime.batch.actors import ASKED, DrawingActor, EncodingActor, ReadingActor, batch_of
from hart_runtime.batch.artist import Draw, Means
from hart_runtime.batch.bundles import in_store
from hart_runtime.batch.cluster import check_nodes, connected, nodes_of, versions_here
from hart_runtime.batch.output import Finished
from hart_runtime.batch.plan import Picture, Plan
from hart_runtime.batch.sources import Given
from hart_runtime.common.errors import InputError, RunError, first_line
from hart_runtime.runtime.backends.names import CPU
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.needs import Needs, actors_for, device_for, needs_of, without
from hart_runtime.runtime.spec import ModelSpec

MOST_BATCHES, TASKS_EACH = 16, 8
"""Batches of a task at the most, since one that dies with its actor is drawn again as a whole; and the tasks
that each actor should have, so that all end at about the same time."""
MOST_DEATHS = 5
"""Times that an actor is started again, and that what it drew is tried: what kills every actor that draws it
would else go on for ever."""
MOST_SILENCE = 900
"""Seconds without a picture until a run is given up."""


@contextmanager
def on_ray(
    address: str,
    bundle: Bundle,
    means: Means,
    actors: tuple[int, int] | None = None,
    cpus: float | None = None,
    push: bool = False,
    encoders: int = 0,
) -> Iterator[Draw]:
    """What draws on a cluster, which is connected until the block ends, and has room and the bundle.

    Args:
        address: as :func:`hart_runtime.batch.cluster.connected` takes it.
        actors: at the least and at the most; as many as fit if None.
        cpus: of each actor.
        push: bring the bundle to the nodes.
        encoders: actors that hold the text encoder, which those that draw do not hold then; 0: all do.

    Raises:
        InputError: no Ray answers, or nodes lack the bundle, this package, or room for the actors.
    """
    manifest = bundle.manifest
    if encoders and manifest.model.num_classes:
        raise InputError(f"`encoders`: {bundle.folder} draws classes, and has no text encoder")
    with connected(address):
        rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device = device_for(means.device, manifest, rooms)
        batch = means.batch or manifest.max_batch
        text_needs = needs_of(manifest, batch, device, cpus, drawing=False)
        if encoders:
            actors_for((encoders, encoders), text_needs, rooms, "encoders")
            rooms = without(rooms, text_needs, encoders)
        needs = needs_of(manifest, batch, device, cpus, text=not encoders)
        least, most = actors_for(actors, needs, rooms)
        identity = None if push else means.identity
        check_nodes(nodes_of(means.bundle), versions_here(), means.bundle, identity)
        pieces = in_store(bundle) if push else None
        threads = means.threads or (max(1, round(needs.cpus)) if device == CPU else None)
        means = replace(means, device=device, threads=threads)
        _be_quiet()

        def draw(plan: Plan, pictures: Sequence[Picture]) -> Iterator[list[Finished]]:
            batches = 1 if encoders else len(pictures) // (batch * most * TASKS_EACH)
            size = batch * max(1, min(MOST_BATCHES, batches))
            parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
            tables = [pa.Table.from_pylist([asdict(picture) for picture in part], ASKED) for part in parts]
            data = ray.data.from_arrow(tables)
            if encoders:
                count = (encoders, encoders)
                data = _pool(data, EncodingActor, (means, batch, pieces), size, count, text_needs)
            reader = _reader(plan.sources, manifest.model) if plan.sources else None
            arguments = (means, plan.settings, pieces, bool(encoders), reader)
            data = _pool(data, DrawingActor, arguments, size, (least, most), needs)
            try:
                for block in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                    yield from map(batch_of, block.to_pylist())
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"Ray gave up ({first_line(error)}); what is drawn is kept, the same command goes on"
                ) from None

        yield draw


def _reader(given: Sequence[Given], model: ModelSpec) -> Any:
    """Brings given pictures from this machine to whoever draws, when it is their turn: no disk is shared, and
    the object store never holds all of them.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ReadingActor).remote(given, model)


def _pool(
    data: Any, actor: type, arguments: tuple[Any, ...], size: int, count: tuple[int, int], needs: Needs
) -> Any:
    """Blocks of so many rows, each through an actor of a pool."""
    return data.map_batches(
        actor,
        batch_size=size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(min_size=count[0], max_size=count[1]),
        fn_constructor_args=arguments,
        num_cpus=needs.cpus,
        num_gpus=needs.gpus,
        memory=needs.memory,
        max_restarts=MOST_DEATHS,
        max_task_retries=-1,  # for a node that goes is unavailable before it is known to be dead
    )


def _be_quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = MOST_SILENCE
    context.target_max_block_size = 1  # a block for every batch: who writes should not wait for more
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # of this there is no other yet
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
