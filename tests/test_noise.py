"""Random numbers: what seeds stand for, that shared ones show nowhere, and that they are drawn ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.noise import Array, Places, RecordedNoise, SeededNoise, pool_size
from hart_runtime.common.schedule import scale_steps
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.export.modules import SmoothGraph
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.sampling import smooth_codes, windows
from hart_runtime.runtime.ahead import Ahead
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.families.hart import NAME
from hart_runtime.runtime.loop import draw
from hart_runtime.runtime.manifest import manifest_of
from hart_runtime.runtime.memory.host import HostMemory
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.program import Program, none
from hart_runtime.runtime.spec import ModelSpec

VOCABULARY, SIDE, KEPT = 4096, 64, 300
"""Those of the last scale of a published picture."""


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    alone, together = SeededNoise([5]), SeededNoise([4, 5, 6])
    assert np.array_equal(alone.uniform(2, 9)[0], together.uniform(2, 9)[1])
    assert np.array_equal(alone.residual_start(4, 32)[0], together.residual_start(4, 32)[1])
    assert np.array_equal(alone.residual_step(3, 4, 32)[0], together.residual_step(3, 4, 32)[1])
    (pool, start), (pools, starts) = (noise.exponential(3, 25, 50) for noise in (alone, together))
    assert np.array_equal(pool[0], pools[1])
    assert np.array_equal(start[0], starts[1])


def test_noise_streams_differ_and_have_the_right_distribution() -> None:
    noise = SeededNoise([0])
    assert not np.array_equal(noise.uniform(0, 100), noise.uniform(1, 100))
    assert noise.uniform(0, 20000).mean() == pytest.approx(0.5, abs=0.01)
    exponential, _ = noise.exponential(0, 3000, 2000)
    for x in (1e-3, 0.1, 1.0, 5.0):
        assert (exponential < x).mean() == pytest.approx(1 - np.exp(-x), rel=0.1)
    assert 0 < exponential.min() < exponential.max() < np.inf
    normal = noise.residual_start(500, 32)
    assert normal.mean() == pytest.approx(0.0, abs=0.02)
    assert normal.std() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("tokens", [1, 25, SIDE**2])
def test_every_window_lies_in_the_pool_and_no_two_begin_alike(tokens: int) -> None:
    pool, start = SeededNoise([1, 2]).exponential(4, tokens, 700)
    assert pool.shape == (2, pool_size(tokens, 700))
    assert start.min() >= 0
    assert start.max() + 700 <= pool.shape[1]
    assert all(len(set(row)) == tokens for row in start.tolist())


def drawn(pool: Array, start: Places, logits: NDArray[Any], kept: Places) -> tuple[Places, Places]:
    """The code with the largest sum of logit and Gumbel noise at each token, and its number in the pool."""
    places = start[:, None] + kept
    best = np.argmax(logits - np.log(pool[places]), axis=1)
    return kept[best], places[np.arange(len(start)), best]


@pytest.mark.parametrize("logits", [np.zeros(16), np.linspace(0, 4, 16)], ids=["flat", "peaked"])
def test_codes_follow_the_softmax(logits: NDArray[Any]) -> None:
    """Of one token of each of many pictures, with codes far apart and windows that overlap."""
    kept = np.random.default_rng(0).choice(512, 16, replace=False)
    seeds, tokens = 4000, 36
    pools, starts = SeededNoise(range(seeds)).exponential(5, tokens, 512)
    codes = [
        drawn(pools[i], starts[i, i % tokens : i % tokens + 1], logits, kept)[0][0] for i in range(seeds)
    ]
    counts = np.array([codes.count(code) for code in kept])
    expected = seeds * np.exp(logits) / np.exp(logits).sum()
    chi_square, freedom = np.square(counts - expected) @ (1 / expected), len(kept) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_shared_numbers_make_no_pattern() -> None:
    """Codes of a flat distribution over a whole map, as independent draws would choose them."""
    rng = np.random.default_rng(1)
    pictures, spread, shared = 40, 0.0, 0
    steps = [(y, x) for y in range(3) for x in range(-2, 3) if (y, x) > (0, 0)]
    equal = dict.fromkeys(steps, 0)
    pools, starts = SeededNoise(range(pictures)).exponential(13, SIDE**2, VOCABULARY)
    for pool, start in zip(pools, starts, strict=True):
        kept = rng.choice(VOCABULARY, KEPT, replace=False)
        codes, numbers = drawn(pool, start, np.zeros(KEPT), kept)
        cells = codes.reshape(SIDE, SIDE)
        for y, x in steps:
            left, right = (max(-x, 0), SIDE - max(x, 0)), (max(x, 0), SIDE - max(-x, 0))
            equal[y, x] += int((cells[: SIDE - y, slice(*left)] == cells[y:, slice(*right)]).sum())
        counts = np.bincount(codes, minlength=VOCABULARY)[kept]
        spread += float(np.square(counts - SIDE**2 / KEPT).sum() / (SIDE**2 / KEPT))
        times = np.unique(numbers, return_counts=True)[1]
        shared += int((times * (times - 1) // 2).sum())
    for (y, x), found in equal.items():
        expected = pictures * (SIDE - y) * (SIDE - abs(x)) / KEPT
        assert abs(found - expected) < 4 * np.sqrt(expected), (y, x)
    freedom = pictures * (KEPT - 1)
    assert abs(spread - freedom) < 4 * np.sqrt(2 * freedom), "the variance of a code's count"
    assert shared < 2e-3 * pictures * SIDE**2 * (SIDE**2 - 1) / 2, "one pair in a thousand, as is told"


def test_noise_belongs_to_a_code() -> None:
    """Whatever its rank and however logits are rounded: near ties that swap change nothing else."""
    model = load_hart(find_checkpoint(DEMO_CHECKPOINT))
    codebook = model.tokenizer.quantize.embedding.weight
    step = scale_steps((1, 2, 3), SamplingSettings(), len(codebook))[1]
    pool, start = map(torch.from_numpy, SeededNoise([3, 4]).exponential(1, 4, len(codebook)))
    logits = torch.randn(2, 2, 2, len(codebook), generator=torch.Generator().manual_seed(0))
    gain, temperature = torch.tensor(step.logit_gain), torch.tensor(step.temperature)

    def mixed(logits: torch.Tensor) -> torch.Tensor:
        return SmoothGraph(model)(logits, pool, start.unflatten(1, (2, 2)), gain, temperature)

    with torch.inference_mode():
        expected = smooth_codes(logits.flatten(1, 2), windows(pool, start, len(codebook)), codebook, step)
        assert torch.allclose(mixed(logits).flatten(1, 2), expected, atol=1e-5)
        # Half precision makes ties of near ones, and so changes ranks.
        halves = logits.half().float()
        assert not torch.equal(halves.argsort(-1), logits.argsort(-1))
        off = (mixed(halves) - mixed(logits)).abs().max()
        again = torch.from_numpy(SeededNoise([5, 6]).exponential(1, 4, len(codebook))[0])
        other = smooth_codes(logits.flatten(1, 2), windows(again, start, len(codebook)), codebook, step)
        assert 20 * off < (other - expected).abs().max(), "as other noise would"


def test_a_recording_is_a_pool() -> None:
    rng = np.random.default_rng(0)
    recorded = rng.exponential(size=(3, 4, 50)).astype(np.float32)
    noise = RecordedNoise({"scale0.u": np.zeros((3, 1)), "scale1.gumbel_exp": recorded})
    pool, start = noise.exponential(1, 4, 50)
    assert np.array_equal(windows(torch.from_numpy(pool), torch.from_numpy(start), 50).numpy(), recorded)


MANIFEST = manifest_of(NAME, ModelSpec((1, 2, 3), 1, 24, 2, 700, 4, 48, 7, 5, 8))


def program() -> Program:
    return MANIFEST.program(SamplingSettings(), 2)


def arrays(threads: int) -> Iterator[NDArray[Any]]:
    one, ahead = program(), Ahead(program(), SeededNoise([7, 8]), threads)
    for run in one.runs():
        yield from ahead.take(run).values()


def test_what_is_drawn_ahead_does_not_depend_on_threads() -> None:
    at_once = [a for run in program().runs() for a in run.random(SeededNoise([7, 8])).values()]
    for threads in (1, 4):
        for one, other in zip(arrays(threads), at_once, strict=True):
            assert np.array_equal(one, other)


class Held(SeededNoise):
    """Tells what is asked of it, and waits at the residual's start."""

    def __init__(self, held: bool) -> None:
        super().__init__([0, 1])
        self.asked: list[object] = []
        self.reached, self.go_on = threading.Event(), threading.Event()
        if not held:
            self.go_on.set()

    def uniform(self, scale: int, tokens: int) -> Array:
        self.asked.append(("uniform", scale))
        return super().uniform(scale, tokens)

    def residual_start(self, tokens: int, channels: int) -> Array:
        self.reached.set()
        assert self.go_on.wait(60)
        return super().residual_start(tokens, channels)

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        self.asked.append(("step", step))
        return super().residual_step(step, tokens, channels)


def test_numbers_are_drawn_in_the_order_of_use() -> None:
    noise = Held(held=False)
    ahead = Ahead(program(), noise, threads=1)
    taken: list[Any] = [ahead.take(run) for run in program().runs() if run.random is not none]
    assert noise.asked == [*(("uniform", k) for k in range(3)), *(("step", k) for k in range(8))]
    assert [len(a["uniform"][0]) for a in taken if "uniform" in a] == [1, 2, 3]


class Idle(HostMemory):
    """Memory of the host, and graphs that compute nothing."""

    name = "idle"

    def execute(self, *given: object) -> None:
        pass


def test_an_abandoned_drawing_draws_no_more() -> None:
    noise, backend = Held(held=True), PlannedBackend(Bundle(Path(), MANIFEST, ""), Idle())
    given = {"features": np.zeros((2, 7, 5), np.float32), "mask": np.ones((2, 7), np.bool_)}
    drawing = draw(backend, program(), given, noise, threads=1)
    next(drawing)
    assert noise.reached.wait(60)
    drawing.close()  # type: ignore[attr-defined]
    noise.go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("random"):
            thread.join(60)
    assert noise.asked[-1] == ("step", 0), "the arrays that were begun are the last"
