"""Takes every measurement of one bundle, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from hart_runtime.bench import REFERENCES
from hart_runtime.bench.against import compare_with, find_reference
from hart_runtime.bench.fresh import draw_in_a_fresh_process
from hart_runtime.bench.machine import describe_machine, read_state, watch_company
from hart_runtime.bench.peak import Peak, measure_peak
from hart_runtime.bench.result import Breakdown, Latency, Result, StageResult
from hart_runtime.bench.samples import Samples
from hart_runtime.bench.timing import Stage, TimedBackend, Trace, by_graph, by_stage
from hart_runtime.bench.workload import drawing, subject
from hart_runtime.common.errors import one_of, whole_in_range
from hart_runtime.runtime import stages
from hart_runtime.runtime.backends.names import AUTO, parse_device
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.editing import encode
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.pipeline import Pipeline
from hart_runtime.runtime.work import Work, count, work_of

FRESH_PROCESSES = 5
Progress = Callable[[str], None]
"""Told what is measured next."""


@dataclass(frozen=True)
class Task:
    """What to measure."""

    bundle: Path
    device: str = AUTO
    backend: str = AUTO
    batches: tuple[int, ...] = (1,)
    """Latency is measured for all, stages for the first."""
    iterations: int = 10
    warmup: int = 3
    threads: int | None = None
    against: tuple[str, ...] = ()
    checkpoint: Path | None = None
    """What the bundle was exported from, for ``against``; by default the demo's."""
    size: int | None = None
    """Of the pictures, where the bundle draws several; its first if left out."""


def measure(plan: Task, progress: Progress) -> Result:
    """Measure a bundle.

    Raises:
        InputError: the bundle cannot be opened, or cannot do what the plan asks for.
        RunError: a picture failed.
    """
    for name in plan.against:
        one_of("against", name, REFERENCES)
    progress("opening the bundle")
    bundle = open_bundle(plan.bundle).at_size(plan.size)
    for batch in plan.batches:
        whole_in_range("batches", batch, 1, bundle.manifest.max_batch, " (the bundle's maximum)")
    checkpoint = find_reference(bundle, plan.checkpoint) if plan.against else None
    backend = open_backend(bundle, plan.device, plan.threads, plan.backend)
    device = backend.device if plan.device == AUTO else plan.device
    _, index = parse_device(device)
    before = read_state(index)
    with watch_company(index) as company:
        first = []
        for _ in range(min(plan.iterations, FRESH_PROCESSES)):
            progress("first picture of a fresh process")
            first.append(
                draw_in_a_fresh_process(bundle.folder, device, plan.threads, backend.name, plan.size)
            )
        progress("the device's peak")
        peak = measure_peak(bundle, device, plan.threads, backend.name)
        pipeline = Pipeline(bundle, backend, plan.threads)
        latency, traces = _draw(plan, pipeline, progress)
        against = []
        if checkpoint:
            against = compare_with(
                plan.against, pipeline, checkpoint, plan.iterations, plan.warmup, plan.threads, progress
            )
        progress("a given picture")
        encoding = _encode(plan, pipeline)
        # Somebody may have slowed the first measurement; what was reached once can be reached.
        progress("the device's peak, again")
        peak = peak.or_better(measure_peak(bundle, device, plan.threads, backend.name))
    batch = plan.batches[0]
    return Result(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        bundle=_describe(bundle),
        device=backend.device,
        backend=backend.name,
        threads=plan.threads,
        machine=describe_machine(index),
        before=before,
        after=read_state(index),
        company=company,
        first_pictures=tuple(first),
        peak=peak,
        latency=tuple(latency),
        breakdown=break_down(batch, traces, count(bundle.manifest, batch), peak),
        against=tuple(against),
        encoder=_encoder(bundle, encoding, peak) if encoding else None,
    )


def _draw(plan: Task, pipeline: Pipeline, progress: Progress) -> tuple[list[Latency], list[Trace]]:
    """Latency of every batch size; for the first, a trace in turns with each picture."""
    timed = TimedBackend(pipeline.backend)
    traced = drawing(Pipeline(pipeline.bundle, timed, plan.threads), plan.batches[0])
    latency: list[Latency] = []
    traces: list[Trace] = []
    for batch in plan.batches:
        draw = drawing(pipeline, batch)
        seconds = []
        for turn in range(-plan.warmup, plan.iterations):
            progress(f"batch {batch}")
            start = time.perf_counter()
            draw()
            taken = time.perf_counter() - start
            trace = timed.trace(traced) if batch == plan.batches[0] else None
            if turn >= 0:
                seconds.append(taken)
                traces += [trace] if trace else []
        samples = Samples.of(seconds)
        latency.append(Latency(batch, samples, batch / samples.p50))
    return latency, traces


def _encode(plan: Task, pipeline: Pipeline) -> list[Stage]:
    """Times of encoding a picture, where the bundle has an encoder."""
    model = pipeline.bundle.manifest.model
    if ENCODER not in pipeline.bundle.manifest.graphs:
        return []
    timed, side = TimedBackend(pipeline.backend), model.image_size
    image = np.random.default_rng(0).random((1, 3, side, side), np.float32) * 2 - 1
    traces = [
        timed.trace(lambda: encode(timed, model.patch_nums, image))
        for _ in range(plan.warmup + plan.iterations)
    ]
    return [by_stage(trace.spans)[stages.ENCODER] for trace in traces[plan.warmup :]]


def _encoder(bundle: Bundle, times: Sequence[Stage], peak: Peak) -> StageResult:
    manifest = bundle.manifest
    work = work_of(manifest.contract(ENCODER), {**manifest.sizes, "batch": 1})
    inside, host = (Samples.of([getattr(t, name) for t in times]) for name in ("inside", "host"))
    return _beside_the_peak(stages.ENCODER, inside, host, work, peak)


def break_down(batch: int, traces: Sequence[Trace], work: Mapping[str, Work], peak: Peak) -> Breakdown:
    """Times of the stages of several pictures, beside what was counted for them."""
    pictures = [by_stage(trace.spans) for trace in traces]
    graphs = [by_graph(trace.spans) for trace in traces]
    results = []
    for name in pictures[0]:
        seconds = Samples.of([picture[name].inside for picture in pictures])
        host = Samples.of([picture[name].host for picture in pictures])
        results.append(_beside_the_peak(name, seconds, host, work.get(name), peak))
    return Breakdown(
        batch,
        Samples.of([trace.wall for trace in traces]),
        tuple(results),
        {name: Samples.of([picture[name] for picture in graphs]) for name in graphs[0]},
    )


def _beside_the_peak(
    name: str, seconds: Samples, host: Samples, work: Work | None, peak: Peak
) -> StageResult:
    if work is None:
        return StageResult(name, seconds, host, None, None, None, None, None)
    by_operations, by_bytes = work.operations / peak.operations, work.bytes / peak.bytes
    return StageResult(
        name,
        seconds,
        host,
        work.operations,
        work.bytes,
        by_operations / seconds.p50,
        by_bytes / seconds.p50,
        floor=max(by_operations, by_bytes),
    )


def _started(bundle: Bundle) -> str:
    asked = subject(bundle)
    if asked is None:
        return "random text features"
    return f"{'class' if bundle.manifest.model.num_classes else 'prompt'}: {asked}"


def _describe(bundle: Bundle) -> dict[str, object]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "identity": bundle.identity,
        "precision": manifest.precision,
        "image_size": manifest.model.image_size,
        "sampling": asdict(manifest.sampling),
        "starts_at": _started(bundle),
    }
