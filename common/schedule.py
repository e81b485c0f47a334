"""What changes from scale to scale: guidance, truncation, temperature, resampling.

Plain numbers and numpy, no torch: the reference model and the runtime both read
the schedule here. References in the docstrings are to the behaviour of the
published sampler, which differs from the usual formulas in several places.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.pruning import pruning_of
from hart_runtime.common.settings import SamplingSettings

Array = NDArray[np.float32]


PUBLISHED_TOP_K, PUBLISHED_TOP_K_LATE, LATE = 600, 300, 7
"""The published sampler's, and the scale from which on it keeps fewer codes."""


def published_top_k(scale: int) -> int:
    """Codes kept per token where no setting says otherwise."""
    return PUBLISHED_TOP_K if scale < LATE else PUBLISHED_TOP_K_LATE


@dataclass(frozen=True)
class ScaleStep:
    """One turn of the loop over scales."""

    index: int
    patch_num: int
    """Side of the token map."""
    guidance: float
    """t in ``(1 + t) * cond - t * uncond``."""
    logit_gain: float
    """Factor of the logits in smooth mode."""
    temperature: float
    """tau of the Gumbel softmax in smooth mode."""
    top_k: int
    top_p: float
    guided: bool = True
    """Whether the unconditional half takes part."""
    kept: int | None = None
    """Tokens that take part; ``None`` for all."""
    remembered: bool = False
    """Whether pruned scales receive what this one's tokens received."""

    @property
    def num_tokens(self) -> int:
        return self.patch_num**2


def scale_steps(
    patch_nums: Sequence[int], settings: SamplingSettings, vocab_size: int, hybrid: bool = True
) -> tuple[ScaleStep, ...]:
    """The loop over scales. Guidance rises as ``guidance * k / (S - 1)``.

    With the hybrid tokenizer the last scale re-uses the ratio of the one before it, as HART's published
    code does (its last scale is handled by separate code that never updates the ratio), and codes are
    kept by its rule where no setting says how many. VAR's goes on to 1, and keeps all codes there.
    Without guidance the conditional half alone is drawn from; gain and temperature stay as they are.

    Raises:
        InputError: the pyramid cannot be pruned as the settings ask.
    """
    last = len(patch_nums) - 1
    pruning = pruning_of(patch_nums, settings.keep) if settings.prune else None
    stale = last - 1 if hybrid else last
    steps = []
    for index, patch_num in enumerate(patch_nums):
        ratio = min(index, stale) / last
        most = published_top_k(index) if hybrid else vocab_size
        guided = index == 0 or index <= last - settings.unguided_scales  # the first has no guidance yet
        steps.append(
            ScaleStep(
                index=index,
                patch_num=patch_num,
                guidance=settings.guidance * ratio if guided else 0.0,
                logit_gain=1 + ratio,
                temperature=max(0.27 * (1 - ratio * 0.95), 0.005),
                top_k=min(settings.top_k or most, vocab_size),
                top_p=settings.top_p,
                guided=guided,
                kept=pruning.kept.get(index) if pruning else None,
                remembered=pruning is not None and index == pruning.remembered,
            )
        )
    return tuple(steps)


def residual_guidance(last_scale: ScaleStep) -> float:
    """Guidance weight of the diffusion head: that of the last scale.

    A weight of exactly 1.0 makes the published sampler take a branch without any
    guidance, which is the same as a weight of 0.
    """
    return 0.0 if last_scale.guidance == 1.0 else last_scale.guidance


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which phi convolution scale ``scale`` uses: the nearest of ``num_phi`` ticks.

    Ties are decided by float64 rounding, as in the published code.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - scale / (num_scales - 1))))


@functools.cache
def upsample_matrix(size: int, target: int) -> Array:
    """Bicubic upsampling along one axis as a (target, size) matrix.

    a = -0.75, half-pixel centres, borders clamped, no antialiasing, and not the
    identity's shortcut: for ``size == target`` it is the identity by arithmetic.
    A map h becomes ``M @ h @ M.T``. Made once and not to be written to.
    """
    matrix = np.zeros((target, size), dtype=np.float64)
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        left = math.floor(centre)
        for tap in range(left - 1, left + 3):
            matrix[row, min(max(tap, 0), size - 1)] += _cubic(abs(centre - tap))
    return matrix.astype(np.float32)


@functools.cache
def downsample_matrix(size: int, target: int) -> Array:
    """Adaptive average pooling along one axis as a (target, size) matrix.

    Made once and not to be written to.
    """
    matrix = np.zeros((target, size), dtype=np.float64)
    for row in range(target):
        start, stop = row * size // target, -(-(row + 1) * size // target)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix.astype(np.float32)


@functools.cache
def cell_axis(patch_num: int, last_patch_num: int) -> Array:
    """Rotary coordinates of an image scale's rows, which are those of its columns, (patch_num,).

    Cells are spread over the extent of the last scale without a half-cell shift.
    Made once and not to be written to.
    """
    return np.arange(patch_num, dtype=np.float32) / np.float32(patch_num) * np.float32(last_patch_num)


def cell_positions(patch_num: int, last_patch_num: int) -> Array:
    """Rotary (row, column) coordinates of an image scale, (patch_num ** 2, 2), row-major.

    The caller adds the offset of the context.
    """
    axis = cell_axis(patch_num, last_patch_num)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([rows, columns], axis=-1).reshape(-1, 2)


def _cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return a * (((distance - 5) * distance + 8) * distance - 4)
    return 0.0
