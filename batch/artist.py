"""Draws pictures of a plan: the one class that does the work, in this process or in an actor of Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hart_runtime.batch.output import Finished
from hart_runtime.batch.plan import Picture, Plan, in_batches
from hart_runtime.batch.sources import Read, read_here
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.picture_record import record_of
from hart_runtime.runtime.pictures import Source
from hart_runtime.runtime.pipeline import Pipeline, Result, batch_size
from hart_runtime.runtime.png import Origin, means, png_bytes

MOST_FAILURES = 3
"""Pictures in a row that fail, each by itself, before it is the machine that is taken for broken."""


@dataclass(frozen=True)
class Means:
    """What pictures are drawn with."""

    bundle: Path
    identity: str
    device: str
    backend: str
    threads: int | None
    batch: int | None
    size: int | None = None
    """Of the pictures, where the bundle draws several; its first if left out."""


Draw = Callable[[Plan, Sequence[Picture]], Iterator[list[Finished]]]
"""Draws pictures of a plan, batch by batch, in an order of its own."""


def opened(means: Means) -> tuple[Bundle, Callable[[Bundle], Backend]]:
    """The bundle, verified, and what opens it or a part of it.

    Raises:
        InputError: it is none, or another than the one that was planned with.
    """
    bundle = open_bundle(means.bundle, wait=False)
    if bundle.identity != means.identity:
        raise InputError(
            f"{means.bundle}: expected the bundle {means.identity[:12]}..., found {bundle.identity[:12]}...; "
            f"copy it here again"
        )
    return bundle.at_size(means.size), lambda part: open_backend(
        part, means.device, means.threads, means.backend
    )


def alone(means: Means, plan: Plan, pictures: Sequence[Picture]) -> Iterator[list[Finished]]:
    """Draw pictures of a plan in this process, without its text encoder where the prompts are few.

    Raises:
        InputError, RunError: the bundle cannot be opened, or pictures fail one after another.
    """
    bundle, open_part = opened(means)
    size = batch_size(bundle.manifest, len(pictures), means.batch)
    texts = [picture.prompt for picture in pictures]
    pipeline = Pipeline.for_prompts(bundle, texts, size, open_part, means.threads)
    read = read_here(plan.sources, bundle.manifest.model)
    return Artist(pipeline, plan.settings, read, means.batch)(pictures)


class Artist:
    """Draws what it is given, batch after batch; pictures do not depend on their batch."""

    def __init__(
        self, pipeline: Pipeline, settings: Sequence[SamplingSettings], read: Read, batch: int | None
    ) -> None:
        """Draws with a pipeline.

        Args:
            settings: the plan's.
            read: gets its given pictures.
            batch: pictures drawn at once, as many as there can be if None.
        """
        self.pipeline, self.settings, self.read = pipeline, settings, read
        manifest = pipeline.bundle.manifest
        self.batch = batch_size(manifest, batch or manifest.max_batch, None, pipeline.backend.limits)
        self.drawn_with = means(pipeline.backend)
        self._failures = 0

    def __call__(self, pictures: Iterable[Picture]) -> Iterator[list[Finished]]:
        """What became of them, batch by batch; while one is drawn, the one before becomes files.

        Raises:
            RunError: pictures fail one after another, as where a device is broken.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="png") as encoder:
            before: Future[list[Finished]] | None = None
            for part in in_batches(pictures, self.batch):
                for some, drawn, sources in self._drawn(part):
                    coming = encoder.submit(self._finished, some, drawn, sources)
                    if before is not None:
                        yield before.result()
                    before = coming
            if before is not None:
                yield before.result()

    def _drawn(
        self, part: list[Picture]
    ) -> Iterator[tuple[list[Picture], Result | str, Sequence[Source | None]]]:
        """A batch and what it was drawn from, or what is wrong; of one that fails, which one picture can do,
        each by itself.
        """
        jobs = [(picture.prompt, picture.seed) for picture in part]
        try:
            sources = self._sources(part)
            (result,) = self.pipeline.jobs(jobs, self.settings[part[0].settings], sources=sources)
        except (InputError, RunError) as error:
            if len(part) > 1:
                for picture in part:
                    yield from self._drawn([picture])
                return
            self._failures += isinstance(error, RunError)
            if self._failures == MOST_FAILURES:
                raise RunError(
                    f"{MOST_FAILURES} pictures in a row failed, the last of them: {error}"
                ) from None
            yield part, str(error).replace("`", ""), ()
        else:
            self._failures = 0
            yield part, result, sources or [None] * len(part)

    def _sources(self, part: list[Picture]) -> list[Source] | None:
        """What pictures start from, each read once; None where they start from nothing."""
        numbers = [picture.source for picture in part if picture.source is not None]
        found = {number: self.read(number) for number in dict.fromkeys(numbers)}
        return [found[number] for number in numbers] or None

    def _finished(
        self, part: list[Picture], drawn: Result | str, sources: Sequence[Source | None]
    ) -> list[Finished]:
        if isinstance(drawn, str):
            return [Finished(picture.number, 0.0, error=drawn) for picture in part]
        bundle = self.pipeline.bundle
        seconds = sum(drawn.seconds.values()) / len(part)
        found = []
        for picture, image, source in zip(part, drawn.images, sources, strict=True):
            origin = Origin(
                picture.prompt,
                picture.seed,
                drawn.settings,
                bundle.manifest.name,
                bundle.identity,
                drawn_with=self.drawn_with,
                picture=record_of(source) if source is not None else None,
                size=bundle.manifest.model.image_size,
            )
            png = png_bytes(image, origin)
            found.append(Finished(picture.number, seconds, hashlib.sha256(png).hexdigest(), png=png))
        return found
