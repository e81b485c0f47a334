"""Steps of a masked autoregressive model: counts, places, guidance, against the published code's numbers."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError
from hart_runtime.common.masking import guidance_factors, mask_lengths, token_steps
from hart_runtime.common.noise import RecordedTokenNoise, SeededNoise, TokenNoise
from hart_runtime.common.settings import CONSTANT, LINEAR

RECORDED = (61, 55, 45, 32, 16, 1)
"""Unknown tokens after each of six steps over 64, where 2/3 of the way leaves exactly half."""


def counts(tokens: int, iterations: int) -> list[int]:
    return [step.predicted for step in token_steps(tokens, iterations, 2.0, LINEAR)]


def test_lengths_are_those_of_the_published_code() -> None:
    assert mask_lengths(6, 64) == RECORDED
    assert mask_lengths(24, 64)[:8] == (63, 62, 61, 60, 59, 58, 57, 55)
    assert mask_lengths(1, 64) == (1,)
    assert mask_lengths(3, 256)[1] == 128  # float32's cosine leaves 127


def test_counts_of_a_published_picture() -> None:
    assert counts(256, 64)[:16] == [1] * 13 + [2, 3, 2]
    assert counts(256, 64)[-1] == 6
    assert set(counts(256, 64)[13:]) == {2, 3, 4, 5, 6, 7}
    assert counts(256, 256) == [1] * 256
    assert counts(256, 1) == [256]
    known = [step.known for step in token_steps(256, 64, 2.0, LINEAR)]
    assert (known[0], known[-1]) == (0, 250)  # behind 64 tokens of the class: 64 to 314
    assert len(set(known)) == 64


def test_the_upper_clamp_begins_where_it_must() -> None:
    """Below pi * sqrt(L / 2) steps the cosine alone leaves less than all but one in the first."""

    def clamped(iterations: int, tokens: int) -> bool:
        plain = [math.floor(tokens * math.cos(math.pi / 2 * (s + 1) / iterations)) for s in range(iterations)]
        return mask_lengths(iterations, tokens)[:-1] != tuple(plain[:-1])

    assert [clamped(n, 64) for n in (17, 18)] == [False, True]
    assert [clamped(n, 256) for n in (35, 36)] == [False, True]


def test_guidance() -> None:
    assert guidance_factors(LINEAR, 3.0, RECORDED, 64) == (1.09375, 1.28125, 1.59375, 2.0, 2.5, 2.96875)
    assert guidance_factors(CONSTANT, 3.0, RECORDED, 64) == (3.0,) * 6
    assert [step.guided for step in token_steps(64, 2, 1, LINEAR)] == [False, False]
    assert all(step.guided for step in token_steps(64, 2, 0, CONSTANT))


@pytest.mark.parametrize("iterations", [1, 2, 6, 24, 64])
def test_every_token_is_predicted_once(iterations: int) -> None:
    orders = SeededNoise([1, 2, 3]).order(64)
    steps = token_steps(64, iterations, 2.0, LINEAR)
    places = [step.predicted_places(orders) for step in steps]
    assert np.array_equal(np.sort(np.concatenate(places, axis=1)), np.tile(np.arange(64), (3, 1)))
    for step, found in zip(steps, places, strict=True):
        assert step.known_places(orders).shape == (3, step.known)
        assert found.shape == (3, step.predicted)
        assert (np.diff(found) > 0).all()
    assert np.array_equal(np.sort(orders[:, -steps[0].predicted :]), places[0])
    for step, later in itertools.pairwise(steps):
        both = np.concatenate([step.known_places(orders), step.predicted_places(orders)], axis=1)
        assert np.array_equal(np.sort(both), later.known_places(orders))


@pytest.mark.parametrize("iterations", [0, -1, 65, 2.5, True, "6", math.nan])
def test_steps_that_cannot_be(iterations: int) -> None:
    with pytest.raises(InputError, match=r"^`iterations`: expected (1 to 64, the tokens|a whole number)"):
        mask_lengths(iterations, 64)


def test_other_schedules_are_refused() -> None:
    said = "`guidance_schedule='cosine'`: expected linear or constant"
    with pytest.raises(InputError, match=re.escape(said)):
        token_steps(64, 6, 2.0, "cosine")


@pytest.mark.parametrize(
    ("steps", "count", "first", "last"),
    [
        ("100", 100, [0, 10, 20, 30], [979, 989, 999]),
        ("20", 20, [0, 53, 105, 158], [894, 946, 999]),
        ("10,15,20", 45, [0, 37, 74], [964, 982, 999]),
        ("ddim50", 50, [0, 20, 40], [940, 960, 980]),
        ("ddim10", 10, [0, 100], [900]),
        ("", 1000, [0, 1, 2], [998, 999]),
        ("1000", 1000, [0, 1], [999]),
    ],
)
def test_diffusion_steps(steps: str, count: int, first: list[int], last: list[int]) -> None:
    """The network is told the original timestep, whatever the notation."""
    found = diffusion_schedule(steps)
    assert len(found) == count
    assert found.timesteps[: len(first)].tolist() == first
    assert found.timesteps[-len(last) :].tolist() == last


@pytest.mark.parametrize("steps", ["1", "1001", "ddim1", "ddim501", "0", "a", "1,", "400,400,400"])
def test_diffusion_steps_that_cannot_be(steps: str) -> None:
    with pytest.raises(InputError, match=r"^`steps"):
        diffusion_schedule(steps)


def test_an_error_of_eps_grows_as_it_was_measured() -> None:
    """What the first diffusion step multiplies it by: why that step stays in float32."""

    def growth(steps: str) -> int:
        *_, recipm1, coef1, _, _, _, _ = diffusion_schedule(steps).coefficients(-1)
        return round(float(recipm1 * coef1))

    assert [growth(steps) for steps in ("100", "50", "20", "8")] == [316, 632, 1674, 4485]


def test_noise_of_a_picture_is_its_own() -> None:
    """Neither the batch nor the number of pictures beside it changes it."""
    both, one = SeededNoise([5, 6]), SeededNoise([6])
    assert np.array_equal(both.order(64)[1:], one.order(64))
    assert np.array_equal(both.token_start(3, 4, 16)[1:], one.token_start(3, 4, 16))
    assert np.array_equal(both.token_steps(3, 10, 4, 16)[1:], one.token_steps(3, 10, 4, 16))
    assert not np.array_equal(one.token_steps(3, 10, 4, 16), one.token_steps(4, 10, 4, 16))
    assert not np.array_equal(one.order(64)[0], np.arange(64))
    numbers = one.token_steps(0, 100, 64, 16)
    assert abs(float(numbers.mean())) < 0.02
    assert abs(float(numbers.std()) - 1) < 0.02


def test_recorded_noise() -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(5, 6, 4)).astype(np.float16)  # five runs of two pictures' three tokens
    orders = np.stack([rng.permutation(8), rng.permutation(8)])
    tensors = {"orders": orders, "step0.diff.init_noise": steps[0], "step0.diff.noise": steps}
    noise: TokenNoise = RecordedTokenNoise(tensors)
    assert np.array_equal(noise.order(8), orders)
    assert np.array_equal(noise.token_start(0, 3, 4).reshape(6, 4), steps[0])
    assert np.array_equal(noise.token_steps(0, 5, 3, 4)[1], steps[:, 3:])
    for call, words in (
        (lambda: noise.order(9), "orders: expected the places of 9 tokens"),
        (lambda: RecordedTokenNoise({}).order(8), "orders: expected the places of 8 tokens"),
        (lambda: noise.token_start(1, 3, 4), r"step1\.diff\.init_noise: expected \[2, 3, 4\] numbers"),
        (lambda: noise.token_steps(0, 4, 3, 4), r"step0\.diff\.noise: expected \[4, 2, 3, 4\]"),
    ):
        with pytest.raises(InputError, match=words):
            call()
