"""Which codes of a given picture a drawing keeps: VAR's rule of zero-shot editing (arXiv 2404.02905, 4.4).

Plain numbers and numpy, no torch: the reference model and the runtime both read it here. At every scale the
code of a kept position is that of the given picture's own pyramid, every other one is drawn, and the mixture
is what later scales see. References are to the published notebook, ``demo_zero_shot_edit.ipynb``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.bool_]
"""Per picture and cell of a map, (B, n, n): True where the given picture's is kept."""
ALWAYS_KEPT = 3
"""A map of so few cells is kept whole, whatever the mask: that of 1 x 1."""


def kept_inside(cells: Cells, patch_nums: Sequence[int], anew: int = 0) -> tuple[Cells, ...]:
    """What is kept at each scale where a mask says what is kept at the last.

    The mask goes to n x n bilinearly, with half-pixel centres and no antialiasing, and a cell is kept
    where more than half of it is. So a coarse map is decided by the few cells around its sample points.

    Args:
        cells: of the last scale, (B, P, P).
        anew: coarsest scales that are drawn whole, the 1 x 1 among them; the published rule is 0.
    """
    kept = []
    for scale, side in enumerate(patch_nums):
        found = _shrunk(cells, side) > np.float32(0.5)
        if scale < anew:
            found[:] = False
        elif side * side <= ALWAYS_KEPT:
            found[:] = True
        kept.append(found)
    return tuple(kept)


def kept_first(scales: int, patch_nums: Sequence[int], batch: int = 1) -> tuple[Cells, ...]:
    """The first ``scales`` maps are kept whole, all others drawn."""
    return tuple(np.full((batch, side, side), k < scales) for k, side in enumerate(patch_nums))


def _shrunk(cells: Cells, side: int) -> NDArray[np.float32]:
    """(B, P, P) -> (B, n, n), in the order of float32 operations that PyTorch has: ties at a half count."""
    mask = cells.astype(np.float32)
    low, high, share = _samples(cells.shape[-1], side)
    other = np.float32(1) - share
    rows = mask[:, :, low] * other + mask[:, :, high] * share
    mixed: NDArray[np.float32] = rows[:, low] * other[:, None] + rows[:, high] * share[:, None]
    return mixed


@functools.cache
def _samples(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each sample point both neighbours, and how much of the second one is in it."""
    step = float(np.float32(size) / np.float32(side))
    place = np.maximum(step * (np.arange(side) + 0.5) - 0.5, 0).astype(np.float32)  # rounded once
    low = place.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)
