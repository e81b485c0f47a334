"""Drawings: who holds the backend, what a snapshot shows, what is copied, kept and waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hart_runtime import Pipeline, Scale, Snapshot
from hart_runtime.common.errors import InputError
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.planned import MOST_PLANS, PlannedBackend
from tests.host_executor import HostExecutor

PROMPTS = ["a red circle on a white background", "a small blue star on a gray background", "a green ring"]


class Counted(HostExecutor):
    """Counts what the backend asks for."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.uploads: list[str] = []
        self.forgotten: list[range] = []
        self.held: dict[int, int] = {}
        self.waits = self.downloads = 0

    def allocate(self, nbytes: int) -> int:
        address = super().allocate(nbytes)
        self.held[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.held[address]
        super().free(address)

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        self.uploads.append(slot[1] if isinstance(slot, tuple) else "outside")
        super().upload(address, array, slot)

    def download(self, binding: Binding) -> NDArray[Any]:
        self.downloads += 1
        return super().download(binding)

    def forget(self, calls: range) -> None:
        self.forgotten.append(calls)
        super().forget(calls)

    def wait(self, mark: object) -> None:
        self.waits += 1


@pytest.fixture
def counted(demo_bundle: Path) -> tuple[Pipeline, Counted]:
    bundle = open_bundle(demo_bundle)
    executor = Counted(bundle)
    return Pipeline(bundle, PlannedBackend(bundle, executor)), executor


@pytest.fixture
def pipeline(demo_bundle: Path) -> Pipeline:
    bundle = open_bundle(demo_bundle)
    return Pipeline(bundle, on_the_cpu(bundle))


def steps(pipeline: Pipeline, seed: int = 0) -> Iterator[Snapshot]:
    features, mask = pipeline.encode(PROMPTS[:1])
    given = {"features": features, "mask": mask}
    return pipeline.drawer.steps(given, [seed], pipeline.bundle.manifest.sampling)


def test_threads_draw_right_pictures(pipeline: Pipeline) -> None:
    """With other prompts, batches and settings, at the same time."""
    options: Sequence[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "num_images": 2},
        {"smooth": False},
        {"guidance": 2.0, "num_images": 3},
        {"residual": False},
    ]
    jobs = [(prompt, option) for option in options for prompt in PROMPTS]

    def draw(job: tuple[str, dict[str, Any]]) -> list[bytes]:
        return [image.tobytes() for image in pipeline(job[0], **job[1])]

    expected = [draw(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, jobs)) == expected


def test_the_threads_of_a_web_server(demo: Pipeline) -> None:
    """Requests that come at once, each in a thread that asyncio lends."""
    prompts = [PROMPTS[number % 2] for number in range(8)]
    expected = {prompt: demo(prompt, seed=5)[0].tobytes() for prompt in set(prompts)}

    async def serve() -> list[list[Image.Image]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
        return await asyncio.gather(*(asyncio.to_thread(demo, prompt, seed=5) for prompt in prompts))

    for prompt, (image,) in zip(prompts, asyncio.run(serve()), strict=True):
        assert image.tobytes() == expected[prompt]


def test_a_callback_cannot_draw(pipeline: Pipeline) -> None:
    expected = pipeline(PROMPTS[0])[0].tobytes()

    def draws(scale: Scale) -> None:
        pipeline(PROMPTS[1])

    with pytest.raises(InputError, match="a picture is being drawn here already, by the same thread"):
        pipeline(PROMPTS[0], callback=draws)
    assert pipeline(PROMPTS[0])[0].tobytes() == expected


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_what_a_callback_raises_leaves_the_pipeline_usable(
    pipeline: Pipeline, error: type[BaseException]
) -> None:
    """Also for whoever handles it: an error that is being handled keeps everything that raised it."""
    expected = pipeline(PROMPTS[0])[0].tobytes()

    def fails(scale: Scale) -> None:
        if scale.index == 2:
            raise error

    try:
        pipeline(PROMPTS[0], callback=fails)
    except error:
        assert pipeline(PROMPTS[0])[0].tobytes() == expected
    else:
        pytest.fail("nothing was raised")
    assert pipeline(PROMPTS[0])[0].tobytes() == expected


def test_a_drawing_that_is_suspended_is_not_overtaken(pipeline: Pipeline) -> None:
    """Its own thread is refused, another one waits until it is over."""
    expected = pipeline(PROMPTS[1])[0].tobytes()
    suspended = steps(pipeline)
    next(suspended)
    with pytest.raises(InputError, match="finish or close that drawing"):
        pipeline(PROMPTS[1])
    over = threading.Event()
    seen: list[bool] = []

    def draw() -> bytes:
        drawn = pipeline(PROMPTS[1])[0].tobytes()
        seen.append(over.is_set())
        return drawn

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(draw)
        next(suspended)
        over.set()
        suspended.close()  # type: ignore[attr-defined]
        assert job.result(60) == expected
    assert seen == [True]


def test_a_generator_between_pictures_holds_nothing(pipeline: Pipeline) -> None:
    batches = pipeline.batches(PROMPTS, batch=1)
    first = next(batches)
    assert pipeline(PROMPTS[0])[0].tobytes() == first.images[0].tobytes()
    assert len(list(batches)) == 2


def test_a_snapshot_is_decoded_in_its_moment(pipeline: Pipeline) -> None:
    drawing = steps(pipeline)
    first = next(drawing)
    early = first.decode()
    assert early.shape == (1, 3, *[pipeline.bundle.manifest.model.image_size] * 2)
    assert np.array_equal(first.decode(), early)
    second = next(drawing)
    with pytest.raises(InputError, match="the drawing has gone on"):
        first.decode()
    drawing.close()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the drawing has gone on"):
        second.decode()


def test_every_step_is_told_and_the_last_one_holds_the_pictures(pipeline: Pipeline) -> None:
    drawing = list(steps(pipeline, seed=5))
    told = [(snapshot.stage, snapshot.index, snapshot.total) for snapshot in drawing]
    scales = len(pipeline.bundle.manifest.model.patch_nums)
    expected = [("scale", k, scales) for k in range(scales)] + [("residual", k, 8) for k in range(8)]
    assert told == [*expected, ("decoder", 0, 1)]
    drawn = pipeline(PROMPTS[0], seed=5)[0]
    assert np.array_equal(
        (drawing[-1].decode()[0] * 255).astype(np.uint8).transpose(1, 2, 0), np.asarray(drawn)
    )


def test_only_what_is_new_is_copied(counted: tuple[Pipeline, Counted]) -> None:
    """Constants are copied with the first picture, and those that a setting changes with the next."""
    pipeline, executor = counted
    manifest = pipeline.bundle.manifest
    program = manifest.program(manifest.sampling, 1)
    random = sum(len(run.random(SeededNoise([0]))) for run in program.runs())
    constants = sum(sum(a.size > 0 for a in run.constants.values()) for run in program.runs())
    on_host = sum("top_k" in run.constants for run in program.runs())
    uploads = []
    for guidance in (4.5, 4.5, 3.0, 3.0):
        executor.uploads.clear()
        pipeline(PROMPTS[0], guidance=guidance)
        uploads.append([name for name in executor.uploads if name not in ("input_ids", "outside")])
    given = 1  # the mask; features are on the device
    assert len(uploads[0]) == given + random + constants - on_host
    assert len(uploads[1]) == len(uploads[3]) == given + random
    guided = sum("guidance" in run.constants for run in program.runs())
    assert len(uploads[2]) <= given + random + guided
    assert set(uploads[2]) - set(uploads[1]) == {"guidance"}
    assert not executor.forgotten


def test_plans_are_kept_over_one_arena(counted: tuple[Pipeline, Counted]) -> None:
    pipeline, executor = counted
    pipeline.drawer.reserve(2)
    reserved = dict(executor.held)
    for options in ({"batch": 1}, {"residual": False, "batch": 1}):
        pipeline(PROMPTS[:2], **options)  # type: ignore[arg-type]
    assert not executor.forgotten
    assert reserved.keys() <= executor.held.keys(), "nothing moved"
    pipeline(PROMPTS[0], steps="3")  # a fourth: the one that was not used for longest goes
    assert [len(calls) for calls in executor.forgotten] == [len(executor.forgotten[0])]
    assert len(pipeline.backend._plans) == MOST_PLANS  # type: ignore[attr-defined]
    first = executor.forgotten[0]
    pipeline(PROMPTS * 2, batch=6)
    kept = {number for calls in executor.forgotten[1:] for number in calls}
    assert first.stop <= min(kept), "all that was captured for the arena that moved"
    expected = Pipeline(pipeline.bundle, on_the_cpu(pipeline.bundle))
    changes: list[dict[str, Any]] = [{}, {"residual": False}, {"steps": "3"}]
    for change in changes:
        drawn, other = (one(PROMPTS[0], **change)[0] for one in (pipeline, expected))
        assert drawn.tobytes() == other.tobytes()


def test_nothing_waits_unless_somebody_watches(counted: tuple[Pipeline, Counted]) -> None:
    """A watched drawing is at most one step ahead of what is told."""
    pipeline, executor = counted
    pipeline(PROMPTS[0])
    assert executor.waits == 0
    executor.downloads = 0
    pipeline(PROMPTS[0])
    assert executor.downloads == 2, "the latent and the picture, both at the end"
    told: list[tuple[int, Snapshot]] = []
    pipeline(PROMPTS[0], watch=lambda snapshot: told.append((executor.waits, snapshot)))
    assert [waits for waits, _ in told[:-1]] == list(range(len(told) - 1))


def test_settings_are_part_of_a_plan_only_where_memory_changes(counted: tuple[Pipeline, Counted]) -> None:
    pipeline, _ = counted
    for options in ({}, {"guidance": 2.0}, {"top_p": 0.5}, {"guidance": 1.0, "top_p": 0.9}):
        pipeline(PROMPTS[0], **options)  # type: ignore[arg-type]
    assert len(pipeline.backend._plans) == 1  # type: ignore[attr-defined]
    pipeline(PROMPTS[0], top_k=50)  # read on the host, so that a captured call has it in it
    assert len(pipeline.backend._plans) == 2  # type: ignore[attr-defined]


def test_a_larger_batch_than_the_bundles_is_not_reserved(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match="`batch`: expected"):
        Pipeline.load(demo_bundle, batch=9)
    assert Pipeline.load(demo_bundle, device="cpu", batch=2)(PROMPTS[0])


def test_settings_of_programs_do_not_pile_up(pipeline: Pipeline) -> None:
    for number in range(20):
        pipeline.drawer._program(SamplingSettings(guidance=number), 1)
    assert len(pipeline.drawer._programs) <= 8


@pytest.mark.parametrize("most", [0, 50_000])
def test_runs_of_many_sizes_do_not_pile_up(
    counted: tuple[Pipeline, Counted], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where every scale is run by itself: what was held for one size is no use to the next."""
    pipeline, executor = counted
    monkeypatch.setattr("hart_runtime.runtime.memory.planned.MOST_IDLE", most)
    before = sum(executor.held.values())
    for size in (1, 2, 3, 1):
        features, _ = pipeline.encode(PROMPTS[:size])
        assert sum(executor.held.values()) > before
        del features
        assert sum(executor.held.values()) <= before + most
    assert not most or sum(executor.held.values()) > before
