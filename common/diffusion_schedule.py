"""The respaced cosine diffusion of the residual head, in float64 numpy (no torch).

Nichol and Dhariwal, "Improved denoising diffusion probabilistic models" (2021),
with 1000 training steps; sampling visits a subset of them with betas recomputed
for the shorter chain.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, parameter, shown

TRAIN_STEPS = 1000
MAX_BETA = 0.999


@dataclass(frozen=True)
class DiffusionSchedule:
    """Coefficients per step of the respaced chain, index 0 = least noise; all float64."""

    timesteps: NDArray[np.int64]
    """Original timestep the network is told, ascending."""
    alphas_cumprod: NDArray[np.float64]
    sqrt_recip_alphas_cumprod: NDArray[np.float64]
    sqrt_recipm1_alphas_cumprod: NDArray[np.float64]
    posterior_mean_coef1: NDArray[np.float64]
    posterior_mean_coef2: NDArray[np.float64]
    posterior_log_variance_clipped: NDArray[np.float64]
    log_betas: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.timesteps)

    def coefficients(self, index: int) -> NDArray[np.float32]:
        """The seven numbers one denoising step needs, as float32.

        (sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod, posterior_mean_coef1,
        posterior_mean_coef2, log_beta, posterior_log_variance_clipped, noise gate);
        the gate is 0 at the last step, which adds no noise.
        """
        return np.array(
            [
                self.sqrt_recip_alphas_cumprod[index],
                self.sqrt_recipm1_alphas_cumprod[index],
                self.posterior_mean_coef1[index],
                self.posterior_mean_coef2[index],
                self.log_betas[index],
                self.posterior_log_variance_clipped[index],
                float(index != 0),
            ],
            dtype=np.float32,
        )

    def unbounded(self, index: int) -> NDArray[np.float32]:
        """The six numbers of a step without bounds: the first four of :meth:`coefficients`, and two that
        make half the logarithm of its variance of what the network says of it, ``slope * variance + level``.

        Four could be two, but the first step multiplies the rounding of its coefficients by up to
        thousands, so they are rounded as the published code's.
        """
        most, least = self.log_betas[index], self.posterior_log_variance_clipped[index]
        variance = [(most - least) / 4, (most + least) / 4]
        return np.append(self.coefficients(index)[:4], np.array(variance, np.float32))


@functools.cache
def diffusion_schedule(respacing: str) -> DiffusionSchedule:
    """Schedule for a respacing such as ``"8"``, ``"10,15,20"``, ``"ddim50"`` or ``""`` (all steps).

    Raises:
        InputError: the respacing cannot be parsed, or leaves fewer than two steps.
    """
    timesteps = _respaced_timesteps(respacing)
    if len(timesteps) < 2:
        raise InputError(f"`steps`: the residual diffusion needs at least 2 steps, found {shown(respacing)}")
    full = np.cumprod(1.0 - _cosine_betas())
    kept = full[timesteps]
    previous = np.append(1.0, kept[:-1])
    betas = 1.0 - kept / previous
    alphas_cumprod = np.cumprod(1.0 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    return DiffusionSchedule(
        timesteps=timesteps,
        alphas_cumprod=alphas_cumprod,
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1),
        posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        posterior_log_variance_clipped=np.log(np.append(variance[1], variance[1:])),
        log_betas=np.log(betas),
    )


def _cosine_betas() -> NDArray[np.float64]:
    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [
            min(1 - alpha_bar((i + 1) / TRAIN_STEPS) / alpha_bar(i / TRAIN_STEPS), MAX_BETA)
            for i in range(TRAIN_STEPS)
        ]
    )


def _respaced_timesteps(respacing: str) -> NDArray[np.int64]:
    if respacing == "":
        return np.arange(TRAIN_STEPS, dtype=np.int64)
    if respacing.startswith("ddim"):
        wanted = _count(respacing.removeprefix("ddim"), respacing)
        for every in range(1, TRAIN_STEPS):
            if len(range(0, TRAIN_STEPS, every)) == wanted:
                return np.arange(0, TRAIN_STEPS, every, dtype=np.int64)
        raise InputError(f"`steps`: no integer stride visits exactly {wanted} of {TRAIN_STEPS} steps")
    counts = [_count(part, respacing) for part in respacing.split(",")]
    size, extra = divmod(TRAIN_STEPS, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise InputError(f"{parameter('steps', respacing)}: cannot take {count} steps out of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # added up, not multiplied, to round as the published code does
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += length
    return np.array(timesteps, dtype=np.int64)


def _count(text: str, respacing: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9 and 0 < int(digits) <= TRAIN_STEPS):
        raise InputError(
            f"`steps`: expected a number such as 8, a list such as 10,15,20 or ddimN, "
            f"found {shown(respacing)}"
        )
    return int(text)
