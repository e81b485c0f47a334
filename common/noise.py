"""Every random number of a picture, from one small provider (numpy, no torch).

The published sampler mixes three global generators, so its seed does not fix the
picture. Here each image owns a seed, and each use of randomness has a stream of its
own below it: an image does not depend on the batch it is drawn in, nor on how much
randomness another stage consumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError

Array = NDArray[np.float32]
Places = NDArray[np.int64]

NOISE_VERSION = 2
"""Changes whenever a seed stands for other numbers than before."""
SPREAD = 64
"""Numbers of a pool from one token's first to the next one's, see :meth:`SeededNoise.exponential`."""


class TokenNoise(Protocol):
    """Source of randomness for a batch of B images of a masked autoregressive model, whose tokens become
    known in an order of their own; every array has B as its first axis.
    """

    def order(self, tokens: int) -> Places:
        """(B, tokens): the places of a picture's tokens; those at the end become known first."""

    def token_start(self, step: int, tokens: int, channels: int) -> Array:
        """(B, tokens, channels) standard normal start of the diffusion of what ``step`` predicts."""

    def token_steps(self, step: int, runs: int, tokens: int, channels: int) -> Array:
        """(B, runs, tokens, channels) standard normal noise of its ``runs`` denoising steps."""


class Noise(TokenNoise, Protocol):
    """The same for every model."""

    def uniform(self, scale: int, tokens: int) -> Array:
        """(B, tokens) in [0, 1): position in the cumulative distribution of each token."""

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> tuple[Array, Places]:
        """A pool of unit exponentials (B, P), and the place of each token's first in it (B, tokens).

        That of code ``v`` is ``v`` places further on, and its Gumbel noise minus the logarithm. So noise
        belongs to a code, whatever its rank: near ties change places between backends.
        """

    def residual_start(self, tokens: int, channels: int) -> Array:
        """(B, tokens, channels) standard normal start of the residual diffusion."""

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        """(B, tokens, channels) standard normal noise of denoising step ``step`` (0 = first run)."""


def pool_size(tokens: int, vocab_size: int) -> int:
    """Exponentials that a seed has for a scale."""
    return vocab_size + SPREAD * tokens


class SeededNoise:
    """Noise from one integer seed per image."""

    _UNIFORM, _EXPONENTIAL, _START, _STEP, _ORDER, _TOKEN_START, _TOKEN_STEPS = range(7)

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)

    def uniform(self, scale: int, tokens: int) -> Array:
        drawn = self._room(tokens)
        for row, stream in zip(drawn, self._streams(self._UNIFORM, scale), strict=True):
            stream.random(dtype=np.float32, out=row)
        return drawn

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> tuple[Array, Places]:
        """A number for every code of every token would be 39 million for a published picture, of which
        top-k keeps one in thirteen. So tokens share them: their windows on the pool are as long as the
        vocabulary, and begin in cells of :data:`SPREAD` numbers, each in one of its own.

        A number is seen by ``vocab_size / SPREAD`` tokens, 64 of the 4096 of a published map, and as
        another code by each, since no two begin at one place: by itself every token's noise is
        independent over the codes, and no code is favoured at two tokens together. Which tokens share,
        and how far their codes lie apart, is drawn anew for each scale and picture; neighbours on the map
        do no more often than others. Two tokens choose by the same number only if their windows overlap
        (3 pairs in 100) and both kept it (of 300 kept codes about 22): one pair in a thousand.

        Logarithms of uniform numbers, as PyTorch's: twice as fast as numpy's own method.
        """
        pools, starts = self._room(pool_size(tokens, vocab_size)), []
        for pool, stream in zip(pools, self._streams(self._EXPONENTIAL, scale), strict=True):
            stream.random(dtype=np.float32, out=pool)  # k / 2**24, 0 among them
            np.add(pool, np.float32(2**-26), out=pool)  # changes small ones only: neither 0 nor 1 is left
            np.log(pool, out=pool)
            np.negative(pool, out=pool)
            starts.append(SPREAD * stream.permutation(tokens) + stream.integers(SPREAD, size=tokens))
        return pools, np.stack(starts)

    def residual_start(self, tokens: int, channels: int) -> Array:
        return self._normal(self._START, 0, (tokens, channels))

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        return self._normal(self._STEP, step, (tokens, channels))

    def order(self, tokens: int) -> Places:
        return np.stack([stream.permutation(tokens) for stream in self._streams(self._ORDER, 0)])

    def token_start(self, step: int, tokens: int, channels: int) -> Array:
        return self._normal(self._TOKEN_START, step, (tokens, channels))

    def token_steps(self, step: int, runs: int, tokens: int, channels: int) -> Array:
        return self._normal(self._TOKEN_STEPS, step, (runs, tokens, channels))

    def _normal(self, use: int, index: int, shape: tuple[int, ...]) -> Array:
        drawn = self._room(*shape)
        for row, stream in zip(drawn, self._streams(use, index), strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return drawn

    def _room(self, *shape: int) -> Array:
        """For all seeds' numbers, which are drawn where they stay: a copy takes a fifth of the time."""
        return np.empty((len(self.seeds), *shape), np.float32)

    def _streams(self, use: int, index: int) -> list[np.random.Generator]:
        return [
            np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, use, index])))
            for seed in self.seeds
        ]


class RecordedTokenNoise:
    """Orders and noise of a recorded run of MAR, under the names the recordings use.

    ``orders`` (B, L), ``stepS.diff.init_noise`` (B*n, D) and ``stepS.diff.noise`` (T, B*n, D).
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.tensors = tensors
        self.batch = len(tensors.get("orders", ()))

    def order(self, tokens: int) -> Places:
        orders = np.asarray(self.tensors.get("orders", ()))
        expected = np.broadcast_to(np.arange(tokens), (self.batch, tokens))
        if not self.batch or not np.array_equal(np.sort(orders), expected):
            raise InputError(
                f"orders: expected the places of {tokens} tokens for each picture, found {list(orders.shape)}"
            )
        return orders.astype(np.int64)

    def token_start(self, step: int, tokens: int, channels: int) -> Array:
        return self._get(f"step{step}.diff.init_noise", self.batch, tokens, channels)

    def token_steps(self, step: int, runs: int, tokens: int, channels: int) -> Array:
        found = self._get(f"step{step}.diff.noise", runs, self.batch, tokens, channels)
        return np.ascontiguousarray(found.swapaxes(0, 1))

    def _get(self, name: str, *shape: int) -> Array:
        values = np.asarray(self.tensors.get(name, ()), dtype=np.float32)
        if values.size != math.prod(shape):
            raise InputError(f"{name}: expected {list(shape)} numbers, found {list(values.shape)}")
        return values.reshape(shape)


class RecordedNoise(RecordedTokenNoise):
    """Noise replayed from a recorded run of any model, under the names the recordings use.

    ``scaleK.u`` (B, n), ``scaleK.gumbel_exp`` (B, n, V), ``final.diff.init_noise`` and
    ``final.diff.stepJ.noise`` (B*n, Cv). Rows beyond the first B*n belong to the second
    guidance half, whose result the published sampler throws away, and are dropped.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.floating]]) -> None:
        super().__init__(tensors)
        self.batch = len(tensors["scale0.u"]) if "scale0.u" in tensors else self.batch

    def uniform(self, scale: int, tokens: int) -> Array:
        return self._of_each(f"scale{scale}.u", tokens)

    def exponential(self, scale: int, tokens: int, vocab_size: int) -> tuple[Array, Places]:
        """Every token has numbers of its own, one token's behind another's."""
        starts = np.tile(np.arange(tokens, dtype=np.int64) * vocab_size, (self.batch, 1))
        return self._of_each(f"scale{scale}.gumbel_exp", tokens * vocab_size), starts

    def residual_start(self, tokens: int, channels: int) -> Array:
        return self._of_each("final.diff.init_noise", tokens, channels)

    def residual_step(self, step: int, tokens: int, channels: int) -> Array:
        return self._of_each(f"final.diff.step{step}.noise", tokens, channels)

    def _of_each(self, name: str, *shape: int) -> Array:
        values = np.asarray(self.tensors.get(name, ()), dtype=np.float32)
        one = math.prod(shape)
        if values.size % one or not 0 < self.batch * one <= values.size:
            raise InputError(f"{name}: expected {list(shape)} for each picture, found {list(values.shape)}")
        return values.reshape(-1, *shape)[: self.batch]
