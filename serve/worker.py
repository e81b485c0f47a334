"""A worker: a process that owns its pipelines and draws one batch after another.

It ends when its pipe does, as when the server is killed, and at anything that it was not made for: what a
library or a driver left behind then is nobody's to trust.
"""

from __future__ import annotations

import base64
import gc
import io
import os
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock

from PIL import Image

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime import stages
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.class_names import NONE
from hart_runtime.runtime.loop import Snapshot
from hart_runtime.runtime.manifest import read_manifest
from hart_runtime.runtime.picture_record import record_of
from hart_runtime.runtime.pipeline import Pipeline, Result, add_seconds, to_images
from hart_runtime.runtime.png import Origin, means, png_bytes
from hart_runtime.runtime.text import TextEncoder
from hart_runtime.serve.crew import until_the_end
from hart_runtime.serve.messages import Draw, Drawn, Encoding, Failed, Finished, Leave, Ready, Report, Shown
from hart_runtime.serve.remembered import RememberedPrompts

WARM = "a picture that nobody asked for"


@dataclass(frozen=True)
class Plan:
    """What a worker draws with."""

    models: Mapping[str, Path]
    """Folders of bundles by name."""
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    most_loaded: int = 1
    """Bundles that are open at the same time."""


class _Stopped(Exception):  # noqa: N818
    """Nobody waits for this batch any more."""


def work(plan: Plan, pipe: Connection) -> None:
    """Draw what comes through a pipe, until it ends."""
    with until_the_end():
        _Worker(pipe, plan).run()


class _Worker:
    def __init__(self, pipe: Connection, plan: Plan) -> None:
        self.pipe, self.plan = pipe, plan
        self.pipelines: OrderedDict[tuple[str, int], Pipeline] = OrderedDict()
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.coming: list[Future[None]] = []
        self.sending = Lock()

    def run(self) -> None:
        try:
            for name in list(self.plan.models)[: self.plan.most_loaded]:
                manifest, _ = read_manifest(self.plan.models[name])
                pipeline = self.opened(name, manifest.model.image_size)
                next(
                    pipeline.jobs(
                        [(NONE if pipeline.classes else WARM, 0)], pipeline.bundle.manifest.sampling
                    )
                )
        except (InputError, RunError) as error:
            self.send(Failed(None, str(error), isinstance(error, InputError)))
            return
        self.send(Ready())
        while True:
            order = self.pipe.recv()
            if isinstance(order, Draw):
                self.draw(order)

    def send(self, report: Report) -> None:
        with self.sending:
            self.pipe.send(report)

    def opened(self, name: str, size: int) -> Pipeline:
        """The pipeline of a bundle for one size of pictures; the one used least lately gives way to it."""
        if (name, size) not in self.pipelines:
            while len(self.pipelines) >= self.plan.most_loaded:
                self.pipelines.popitem(last=False)
                gc.collect()
            plan = self.plan
            bundle = open_bundle(plan.models[name], wait=False).at_size(size)
            backend = open_backend(bundle, plan.device, plan.threads, plan.backend)
            classes = bundle.manifest.model.num_classes
            prompts = None if classes else RememberedPrompts(TextEncoder(bundle, backend))
            self.pipelines[name, size] = Pipeline(bundle, backend, plan.threads, prompts)
        self.pipelines.move_to_end((name, size))
        return self.pipelines[name, size]

    def draw(self, order: Draw) -> None:
        try:
            pipeline = self.opened(order.model, order.size)
        except (InputError, RunError) as error:
            self.send(Failed(order.number, str(error)))
            return
        batch, (before, taken) = _Batch(self, order), encoded_by(pipeline)
        seconds: dict[str, float] = {}
        jobs = [(job.prompt, job.seed) for job in order.jobs]
        sources = [job.source for job in order.jobs if job.source is not None] or None
        try:
            for result in pipeline.jobs(jobs, order.settings, batch.watch, sources):
                self.hand_over(pipeline, batch, result)
                batch.first += len(result.images)
                add_seconds(seconds, result.seconds)
        except _Stopped:
            self.send(Drawn(order.number, stopped=True))
        except (InputError, RunError) as error:
            self.send(Failed(order.number, str(error), isinstance(error, InputError)))
        else:
            after, passed = encoded_by(pipeline)
            seconds[stages.TEXT_ENCODER] = passed - taken
            self.send(Drawn(order.number, False, seconds, after - before))

    def hand_over(self, pipeline: Pipeline, batch: _Batch, result: Result) -> None:
        """Send the pictures that somebody waits for, while the next ones are drawn."""
        wait(self.coming)  # those of one batch at the most wait to be encoded
        drawn_with, manifest = means(pipeline.backend), pipeline.bundle.manifest
        self.coming = []
        for number, image in enumerate(result.images):
            row, prompt = batch.first + number, result.prompts[number]
            if row in batch.waiting:
                source = batch.order.jobs[row].source
                origin = Origin(
                    prompt,
                    result.seeds[number],
                    result.settings,
                    manifest.name,
                    pipeline.bundle.identity,
                    drawn_with=drawn_with,
                    picture=record_of(source) if source is not None else None,
                    size=manifest.model.image_size,
                )
                future = self.encoder.submit(
                    self.finish, batch.order, row, image, origin, words(pipeline, prompt)
                )
                future.add_done_callback(_all_or_nothing)
                self.coming.append(future)

    def finish(
        self, order: Draw, row: int, image: Image.Image, origin: Origin, words: tuple[int, str | None]
    ) -> None:
        data = encoded(image, order.jobs[row].final, origin)
        self.send(Finished(order.number, row, data, *words))


def _all_or_nothing(future: Future[None]) -> None:
    """A picture that cannot be encoded or sent would be waited for without end."""
    if future.exception() is not None:
        traceback.print_exception(future.exception())
        os._exit(1)


class _Batch:
    """Who waits for a batch that is being drawn."""

    def __init__(self, worker: _Worker, order: Draw) -> None:
        self.worker, self.order = worker, order
        self.waiting = set(range(len(order.jobs)))
        self.first = 0
        """Of the pictures that are drawn now: a backend may hold fewer at once than were asked for."""

    def watch(self, snapshot: Snapshot) -> None:
        """Called after every step."""
        while self.worker.pipe.poll():
            message = self.worker.pipe.recv()
            if isinstance(message, Leave) and message.number == self.order.number:
                self.waiting.discard(message.row)
        if not self.waiting:
            raise _Stopped
        if snapshot.stage in stages.DRAWS and snapshot.index in self.order.scales:
            for row, image in enumerate(to_images(snapshot.decode()), start=self.first):
                if row not in self.waiting:  # or drawn along, to fill a batch
                    continue
                data = encoded(image, self.order.jobs[row].partial)
                self.worker.send(Shown(self.order.number, row, snapshot.index, data))


def encoded_by(pipeline: Pipeline) -> tuple[int, float]:
    """How many prompts it encoded so far, in how many seconds; none where it draws classes."""
    prompts = pipeline.text
    return (prompts.encoded, prompts.seconds) if isinstance(prompts, RememberedPrompts) else (0, 0.0)


def words(pipeline: Pipeline, prompt: str) -> tuple[int, str | None]:
    """Of a prompt that was drawn just now its tokens (a class has none), and what was read if not all."""
    prompts = pipeline.text
    if not isinstance(prompts, RememberedPrompts):
        return 0, None
    read = prompts.read[prompt]
    return prompts.tokens(prompt), None if read == prompt else read


def encoded(image: Image.Image, encoding: Encoding, origin: Origin | None = None) -> str:
    """The bytes of a picture in base64; without an origin a PNG says nothing of itself."""
    if encoding.format == "png" and origin is not None:
        data = png_bytes(image, origin)
    else:
        buffer = io.BytesIO()
        options = {"compress_level": 1} if encoding.format == "png" else {"quality": encoding.quality}
        image.save(buffer, encoding.format.upper(), **options)
        data = buffer.getvalue()
    return base64.b64encode(data).decode("ascii")
