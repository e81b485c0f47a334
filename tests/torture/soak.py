"""The soak: thousands of pictures in one process, with changing settings, batches, prompts and aborted runs.

Memory has to be flat after the first hundred, file descriptors and threads constant, and the first picture's
bytes are drawn again at the end.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hart_runtime import Pipeline
from tests.torture.outcomes import Outcome, Trial
from tests.torture.subjects import PROMPT, SEED, Ground
from tests.torture.workers import in_workers

ROUND = 100
"""Pictures of which the median is taken; every shape occurs in the first."""
GOAL, MOST = 1.0, 4.0
"""KB a picture."""
BATCHES = (1, 2, 3, 4)
WORDS = ("red", "blue", "circle", "square", "star", "a", "on", "white", "background", "small", "日本", "!")
SECONDS = 3600.0


class Stopped(Exception):  # noqa: N818
    """A user's own."""


@dataclass(frozen=True)
class State:
    """What a process holds."""

    memory: float
    """Resident, KB."""
    descriptors: int
    threads: int


def now() -> State:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    return State(pages * os.sysconf("SC_PAGE_SIZE") / 1024, len(os.listdir("/proc/self/fd")), threads)  # noqa: PTH208


def _settings(number: int, rng: random.Random) -> dict[str, Any]:
    """Of a call: each shape comes every few calls, what does not change shapes at random."""
    return {
        "batch": BATCHES[number % len(BATCHES)],
        "smooth": number % 8 > 5,
        "residual": number % 16 != 7,
        "steps": ("2", "3", "8")[number % 3] if number % 12 == 0 else "2",
        "previews": number % 10 == 9,
        "guidance": rng.uniform(0, 6),
        "top_k": rng.choice((None, 1, 5, 100, 512)),
        "top_p": rng.choice((0.0, 0.5, 0.9)),
    }


def _stop_at(count: int) -> Any:
    def watch(_: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise Stopped

    return watch


def draw_round(pipeline: Pipeline, first: int, pictures: int, rng: random.Random) -> int:
    """Draw at least so many pictures; returns the number of the next call."""
    drawn, number = 0, first
    while drawn < pictures:
        size = BATCHES[number % len(BATCHES)]
        prompts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(size)]
        options = _settings(number, rng)
        if number % 7 == 3:
            options |= {"watch": _stop_at(rng.randrange(6))}
        previews = options.pop("previews")
        if previews:
            options |= {"previews": True, "callback": lambda _: None}
        try:
            pipeline.generate(prompts, seed=rng.randrange(2**31), **options)
        except Stopped:
            if rng.random() < 0.5:  # one that is left in the middle
                next(iter(pipeline.batches(prompts, num_images=2, batch=1)))
        drawn += size
        number += 1
    return number


def slope(values: list[float]) -> float:
    """KB a picture, through medians of rounds."""
    if len(values) < 2:
        return 0.0
    places = np.arange(len(values)) * ROUND
    return float(np.polyfit(places, values, 1)[0])


def soak(ground: Ground, pictures: int, seed: int) -> Iterator[Trial]:
    """One trial for each thing that is looked at.

    Args:
        pictures: at least 300 for memory to be judged.
    """

    def make() -> Any:
        found = _soaked(ground, pictures, seed)
        return lambda number: found[number]

    yield from in_workers("soak", make, range(4), 1, SECONDS)


def _soaked(ground: Ground, pictures: int, seed: int) -> list[Trial]:
    pipeline = Pipeline.load(ground.bundle, device="cpu", threads=1, backend="onnxruntime")
    rng = random.Random(seed)

    def first() -> Any:
        return np.asarray(pipeline.generate([PROMPT], seed=SEED).images[0])

    picture = first()
    rounds: list[float] = []
    states: list[State] = []
    call = draw_round(pipeline, 0, ROUND, rng)
    gc.collect()
    before = now()
    for _ in range(pictures // ROUND - 1):
        samples = []
        for _ in range(10):
            call = draw_round(pipeline, call, ROUND // 10, rng)
            samples.append(now())
        rounds.append(statistics.median(state.memory for state in samples))
        states.append(samples[-1])
    gc.collect()
    after, grown = now(), slope(rounds)
    flat = len(rounds) < 3 or grown <= MOST
    said = (
        f"{grown:.2f} KB a picture (goal {GOAL}), {before.memory / 1024:.0f} to {after.memory / 1024:.0f} MB"
    )
    checks = [
        (flat, f"memory: {said}, medians in KB {[round(r) for r in rounds]}"),
        (
            before.descriptors == after.descriptors,
            f"descriptors: {before.descriptors} to {after.descriptors}",
        ),
        (
            before.threads == after.threads,
            f"threads: {before.threads} to {after.threads}, {threading.enumerate()}",
        ),
        (
            np.array_equal(first(), picture),
            f"the first picture again after {pictures} pictures, {call} calls",
        ),
    ]
    return [
        Trial("soak", number, Outcome.EQUAL if fine else Outcome.WRONG, words)
        for number, (fine, words) in enumerate(checks)
    ]
