"""Which tokens of a picture take part at which scale: FastVAR (arXiv 2503.23367) as it was published.

Large scales mostly refine: of their tokens only those take part that differ most from the mean, and all
others receive what their place received at the scale before. No weight changes, so any checkpoint draws so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.settings import parse_keep

PUBLISHED_SIDES = (36, 48, 64)
"""Of the scale that is remembered and of those that are pruned, in published pyramids of 1024 pixels."""
SOURCES = 4
"""Places of a remembered scale that one of a larger scale can touch."""


@dataclass(frozen=True)
class Pruning:
    """What takes part in the drawing of one pyramid."""

    remembered: int
    """Index of the scale whose branches are remembered."""
    kept: Mapping[int, int]
    """Tokens that take part, by index of the pruned scales."""


def pruning_of(patch_nums: Sequence[int], keep: str) -> Pruning:
    """What is remembered and what is kept in a pyramid.

    Where it has the sides 36, 48 and 64, as the published ones of 1024 pixels, 36 is remembered, 48 and 64
    are pruned. Any other is pruned by the same rule at its last two scales.

    Args:
        keep: see :func:`hart_runtime.common.settings.parse_keep`.

    Raises:
        InputError: ``keep`` is none, or there is no scale to remember (at the first there is a text, no map).
    """
    first, second = parse_keep(keep)
    last = len(patch_nums) - 1
    remembered, shares = last - 2, {last - 1: first, last: second}
    if set(PUBLISHED_SIDES) <= set(patch_nums):
        source, *sides = PUBLISHED_SIDES
        of_side = dict(zip(sides, (first, second), strict=True))
        remembered = max(k for k, side in enumerate(patch_nums) if side == source)
        shares = {k: of_side[side] for k, side in enumerate(patch_nums) if side in of_side}
    if remembered < 1:
        raise InputError(
            f"{parameter('prune', True)}: leaves tokens out of two scales behind at least two others, this "
            f"model's are {list(patch_nums)}"
        )
    return Pruning(remembered, {k: tokens_kept(patch_nums[k] ** 2, share) for k, share in shares.items()})


def tokens_kept(tokens: int, share: float) -> int:
    """Published rounding: as many as are left when a whole number of tokens is taken away."""
    return tokens - int((1 - share) * tokens)


@functools.cache
def sources(side: int, target: int) -> NDArray[np.int64]:
    """Places of a ``side`` x ``side`` map whose mean a place of a larger map receives, (4, target * target).

    Along each axis place i touches one or two, floor(side * i / target) to ceil(side * (i + 1) / target) - 1,
    and all that it touches count alike: one alone is there twice. Not to be written to.
    """
    along = np.arange(target)
    first, last = side * along // target, -(-side * (along + 1) // target) - 1
    pairs = [rows[:, None] * side + columns[None] for rows in (first, last) for columns in (first, last)]
    return np.stack(pairs).reshape(SOURCES, -1).astype(np.int64)
