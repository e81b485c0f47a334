"""Which tokens of a masked autoregressive model are predicted in which step, and how far they are guided.

MAR (arXiv 2406.11838), section 3: tokens become known in a random order, few of them at first. All counts
follow from the numbers of steps and tokens alone, so every picture of a batch has the same. Plain numbers
and numpy, no torch: the reference and the runtime both read the steps here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import one_of, whole_in_range
from hart_runtime.common.settings import CONSTANT, GUIDANCE_SCHEDULES

Places = NDArray[np.int64]


@dataclass(frozen=True)
class TokenStep:
    """One turn of the loop."""

    index: int
    known: int
    """Tokens of a picture that are known before it: the encoder sees these."""
    left: int
    """Tokens that are unknown after it."""
    tokens: int
    """Of a picture."""
    guidance: float
    """g in ``uncond + g * (cond - uncond)``."""
    guided: bool
    """Whether the unconditional half takes part."""

    @property
    def predicted(self) -> int:
        """Tokens of a picture that become known."""
        return self.tokens - self.known - self.left

    def known_places(self, orders: Places) -> Places:
        """Where the encoder's tokens are, ascending: sequences stay in the raster's order. (B, known)

        Args:
            orders: (B, tokens), of which those at the end become known first.
        """
        return np.sort(orders[:, self.tokens - self.known :], axis=1)

    def predicted_places(self, orders: Places) -> Places:
        """Where those that become known are, ascending. (B, predicted)"""
        return np.sort(orders[:, self.left : self.tokens - self.known], axis=1)


def token_steps(tokens: int, iterations: int, guidance: float, schedule: str) -> tuple[TokenStep, ...]:
    """The loop over steps, the last of which leaves none unknown.

    Args:
        guidance: 1 leaves the unconditional half out.
        schedule: one of :data:`hart_runtime.common.settings.GUIDANCE_SCHEDULES`.

    Raises:
        InputError: as :func:`mask_lengths` and :func:`guidance_factors`.
    """
    lengths = mask_lengths(iterations, tokens)
    factors = guidance_factors(schedule, guidance, lengths, tokens)
    before = (tokens, *lengths[:-1])
    after = (*lengths[:-1], 0)
    return tuple(
        TokenStep(index, tokens - unknown, left, tokens, factor, guidance != 1)
        for index, (unknown, left, factor) in enumerate(zip(before, after, factors, strict=True))
    )


def mask_lengths(iterations: int, tokens: int) -> tuple[int, ...]:
    """Unknown tokens after every step: the cosine of the share of steps, as the published code counts.

    A step makes at least one token known and leaves at least one, though the last one predicts that too.
    The cosine is float64's: float32's rounds another way where it is exact (2/3 of the way).

    Raises:
        InputError: fewer than one step, or more steps than tokens.
    """
    whole_in_range("iterations", iterations, 1, tokens, ", the tokens of a picture")
    lengths: list[int] = []
    for step in range(1, iterations + 1):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * (step / iterations)))
        most = (lengths[-1] if lengths else tokens) - 1
        lengths.append(max(1, min(most, wanted)))
    return tuple(lengths)


def guidance_factors(
    schedule: str, guidance: float, lengths: Sequence[int], tokens: int
) -> tuple[float, ...]:
    """How far every step is guided, g: from 1 up with the tokens known after it, or the same throughout.

    The last step counts as leaving one token unknown, so that a linear one never reaches ``guidance``.

    Raises:
        InputError: another schedule.
    """
    one_of("guidance_schedule", schedule, GUIDANCE_SCHEDULES)
    if schedule == CONSTANT:
        return (guidance,) * len(lengths)
    return tuple(1 + (guidance - 1) * (tokens - length) / tokens for length in lengths)
