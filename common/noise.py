"""Every random number of a picture, from one small provider (numpy, no torch).

The published sampler mixes three global generators, so its seed does not fix the
picture. Here each image owns a seed, and each use of randomness has a stream of its
own below it: an image does not depend on the batch it is drawn in, nor on how much
randomness another stage consumed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

NOISE_VERSION = 1
"""Changes whenever a seed stands for other numbers than before."""
BLOCK = 64
"""Tokens whose exponentials come from one stream; a megabyte of a published model's."""


class Noise(Protocol):
    """Source of randomness for a batch of B images; every array has B as its first axis."""

    def uniform(self, scale: int, tokens: int) -> Array:
        """(B, tokens) in [0, 1): position in the cumulative distribution of each token."""

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> Array:
        """(B, tokens, vocab_size) unit exponentials E; the Gumbel noise is -log(E)."""

    def residual_start(self, tokens: int, channels: int) -> Array:
        """(B, tokens, channels) standard normal start of the residual diffusion."""

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        """(B, tokens, channels) standard normal noise of denoising step ``step`` (0 = first run)."""


class SeededNoise:
    """Noise from one integer seed per image.

    Args:
        threads: that draw at once, all cores if left out. Numbers do not depend on it.
    """

    _UNIFORM, _EXPONENTIAL, _START, _STEP = range(4)

    def __init__(self, seeds: Sequence[int], threads: int | None = None) -> None:
        self.seeds = tuple(seeds)
        self.threads = threads or _cores()

    def uniform(self, scale: int, tokens: int) -> Array:
        return np.stack([g.random(tokens, np.float32) for g in self._streams(self._UNIFORM, scale)])

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> Array:
        """A published picture takes 39 million of these, more time than a GPU needs for the rest of
        it. So they are logarithms of uniform numbers, as PyTorch's, which is twice as fast as numpy's
        own method, and blocks of tokens have streams of their own, drawn side by side.
        """
        values = np.empty((len(self.seeds), tokens, vocab_size), np.float32)
        blocks = [
            ([seed, self._EXPONENTIAL, scale, start], picture[start : start + BLOCK])
            for seed, picture in zip(self.seeds, values, strict=True)
            for start in range(0, tokens, BLOCK)
        ]
        if min(self.threads, len(blocks)) == 1:
            for block in blocks:
                _fill_exponential(block)
        else:
            list(_pool(self.threads).map(_fill_exponential, blocks))
        return values

    def residual_start(self, tokens: int, channels: int) -> Array:
        return self._normal(self._START, 0, (tokens, channels))

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        return self._normal(self._STEP, step, (tokens, channels))

    def _normal(self, use: int, index: int, shape: tuple[int, int]) -> Array:
        return np.stack([g.standard_normal(shape, np.float32) for g in self._streams(use, index)])

    def _streams(self, use: int, index: int) -> list[np.random.Generator]:
        return [
            np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, use, index])))
            for seed in self.seeds
        ]


def _fill_exponential(block: tuple[list[int], Array]) -> None:
    key, values = block
    stream = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
    stream.random(out=values, dtype=np.float32)  # multiples of 2**-24 from 0 on, below 1
    np.add(values, np.float32(2**-26), out=values)  # changes small ones only: neither 0 nor 1 is left
    np.log(values, out=values)
    np.negative(values, out=values)


def _cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="noise")


class RecordedNoise:
    """Noise replayed from a recorded run, under the names the recordings use.

    ``scaleK.u`` (B, n), ``scaleK.gumbel_exp`` (B, n, V), ``final.diff.init_noise`` and
    ``final.diff.stepJ.noise`` (B*n, Cv). Rows beyond the first B*n belong to the second
    guidance half, whose result the published sampler throws away, and are dropped.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.floating]]) -> None:
        self.tensors = tensors
        self.batch = len(tensors["scale0.u"])

    def uniform(self, scale: int, tokens: int) -> Array:
        return self._get(f"scale{scale}.u", tokens)

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> Array:
        return self._get(f"scale{scale}.gumbel_exp", tokens, vocab_size)

    def residual_start(self, tokens: int, channels: int) -> Array:
        return self._get("final.diff.init_noise", tokens, channels)

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        return self._get(f"final.diff.step{step}.noise", tokens, channels)

    def _get(self, name: str, *shape: int) -> Array:
        values = np.asarray(self.tensors[name], dtype=np.float32)
        return values.reshape(-1, *shape)[: self.batch]
