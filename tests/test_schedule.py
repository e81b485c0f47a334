"""The schedule's numbers against torch, and against what is known of the published sampler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError
from hart_runtime.common.schedule import (
    downsample_matrix,
    phi_index,
    residual_guidance,
    scale_steps,
    upsample_matrix,
)
from hart_runtime.common.settings import SamplingSettings

SIZES = st.integers(1, 64)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_upsampling_is_torchs_bicubic(size: int, target: int) -> None:
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(upsample_matrix(size, target))
    expected = F.interpolate(x, size=(target, target), mode="bicubic")
    # torch computes the cells' centres in float32, the matrix in float64
    assert (matrix @ x @ matrix.T - expected).abs().max() < 1e-4


@settings(deadline=None)
@given(SIZES, SIZES)
def test_downsampling_is_adaptive_average_pooling(size: int, target: int) -> None:
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(downsample_matrix(size, target))
    expected = F.adaptive_avg_pool2d(x, (target, target))
    assert (matrix @ x @ matrix.T - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (5, [0, 1, 2, 2, 3]),
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_phi_of_each_scale(scales: int, expected: list[int]) -> None:
    assert [phi_index(k, scales, 4) for k in range(scales)] == expected


def test_the_last_scale_reuses_the_ratio_before_it() -> None:
    steps = scale_steps((1, 2, 3, 4, 6), SamplingSettings(guidance=4.0), 4096)
    assert [s.guidance for s in steps] == [0.0, 1.0, 2.0, 3.0, 3.0]
    assert [s.top_k for s in steps] == [600] * 5
    assert steps[-1].temperature == pytest.approx(0.27 * (1 - 0.95 * 0.75))


def test_top_k_switches_at_scale_seven_and_never_exceeds_the_vocabulary() -> None:
    pyramid = (1, 2, 2, 3, 3, 4, 4, 5, 6)
    assert [s.top_k for s in scale_steps(pyramid, SamplingSettings(), 1024)] == [600] * 7 + [300] * 2
    assert {s.top_k for s in scale_steps(pyramid, SamplingSettings(), 100)} == {100}
    assert {s.top_k for s in scale_steps(pyramid, SamplingSettings(top_k=7), 1024)} == {7}


def test_guidance_of_exactly_one_means_none_for_the_residual() -> None:
    last = scale_steps((1, 2, 3, 4, 6), SamplingSettings(guidance=4 / 3), 1024)[-1]
    assert last.guidance == 1.0
    assert residual_guidance(last) == 0.0


@pytest.mark.parametrize("steps", ["1", "0", "x", "8,", "2000", "ddim999", "-3"])
def test_impossible_denoising_steps_are_refused(steps: str) -> None:
    with pytest.raises(InputError):
        diffusion_schedule(steps)
