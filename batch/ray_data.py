"""Draws a plan on Ray Data: a pool of actors that each hold a pipeline, and one process that writes."""

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

from hart_runtime.batch.artist import Artist, Draw, Means, opened
from hart_runtime.batch.bundles import Pieces, in_store, on_this_node
from hart_runtime.batch.cluster import check_nodes, connected, nodes_of, versions_here
from hart_runtime.batch.output import Finished
from hart_runtime.batch.plan import Picture, Plan
from hart_runtime.common.errors import InputError, RunError, first_line
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.names import CPU
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.needs import actors_for, device_for, needs_of
from hart_runtime.runtime.pipeline import Pipeline

ASKED = pa.schema(
    {
        "number": pa.int64(),
        "row": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "settings": pa.int32(),
        "error": pa.string(),
    }
)
PICTURE = pa.struct(
    {
        "number": pa.int64(),
        "seconds": pa.float64(),
        "sha256": pa.string(),
        "error": pa.string(),
        "png": pa.binary(),
    }
)
DRAWN = pa.schema({"batch": pa.list_(PICTURE), "failed": pa.string(), "bad_input": pa.bool_()})
"""A row for every batch, whose pictures Ray would take apart in its blocks of bounded size; or why an actor
cannot go on, since of an exception Ray hands on its traceback alone."""
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
) -> Iterator[Draw]:
    """What draws on a cluster, which is connected until the block ends, and has room and the bundle.

    Args:
        address: as :func:`hart_runtime.batch.cluster.connected` takes it.
        actors: at the least and at the most; as many as fit if None.
        cpus: of each actor.
        push: bring the bundle to the nodes.

    Raises:
        InputError: no Ray answers, or nodes lack the bundle, this package, or room for the actors.
    """
    with connected(address):
        rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device = device_for(means.device, bundle.manifest, rooms)
        batch = means.batch or bundle.manifest.max_batch
        needs = needs_of(bundle.manifest, batch, device, cpus)
        least, most = actors_for(actors, needs, rooms)
        identity = None if push else means.identity
        check_nodes(nodes_of(means.bundle), versions_here(), means.bundle, identity)
        pieces = in_store(bundle) if push else None
        threads = means.threads or (max(1, round(needs.cpus)) if device == CPU else None)
        means = replace(means, device=device, threads=threads)
        _be_quiet()

        def draw(plan: Plan, pictures: Sequence[Picture]) -> Iterator[list[Finished]]:
            size = batch * max(1, min(MOST_BATCHES, len(pictures) // (batch * most * TASKS_EACH)))
            blocks = [
                pa.Table.from_pylist([asdict(picture) for picture in pictures[start : start + size]], ASKED)
                for start in range(0, len(pictures), size)
            ]
            drawn = ray.data.from_arrow(blocks).map_batches(
                Actor,
                batch_size=size,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
                fn_constructor_args=(means, plan.settings, pieces),
                num_cpus=needs.cpus,
                num_gpus=needs.gpus,
                memory=needs.memory,
                max_restarts=MOST_DEATHS,
                max_task_retries=MOST_DEATHS,
            )
            try:
                for block in drawn.iter_batches(batch_size=None, batch_format="pyarrow"):
                    yield from map(_batch, block.to_pylist())
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"Ray gave up ({first_line(error)}); what is drawn is kept, the same command goes on"
                ) from None

        yield draw


class Actor:
    """Draws in a process of Ray's."""

    def __init__(self, means: Means, settings: Sequence[SamplingSettings], pieces: Pieces | None) -> None:
        self.artist: Artist | InputError | RunError
        try:
            if pieces is not None:
                means = replace(means, bundle=on_this_node(means.identity, pieces))
            bundle, open_part = opened(means)
            self.artist = Artist(Pipeline(bundle, open_part(bundle), means.threads), settings, means.batch)
        except (InputError, RunError) as error:  # told of with the first picture: Ray would only try again
            self.artist = error

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """A block of pictures to draw, as blocks of those that are drawn."""
        try:
            if isinstance(self.artist, InputError | RunError):
                raise self.artist
            for finished in self.artist(Picture(**row) for row in block.to_pylist()):
                yield _row(batch=[asdict(one) for one in finished])
        except (InputError, RunError) as error:
            yield _row(batch=[], failed=str(error), bad_input=isinstance(error, InputError))


def _row(**values: Any) -> pa.Table:
    return pa.Table.from_pylist([values], DRAWN)


def _batch(row: dict[str, Any]) -> list[Finished]:
    """Of a row; raises what an actor could not go on for."""
    if row["failed"] is not None:
        raise (InputError if row["bad_input"] else RunError)(row["failed"])
    return [Finished(**one) for one in row["batch"]]


def _be_quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = MOST_SILENCE
    context.target_max_block_size = 1  # a block for every batch: who writes should not wait for more
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # of this there is no other yet
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
