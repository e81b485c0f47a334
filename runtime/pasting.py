"""Puts given pixels back where nothing was to be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hart_runtime.runtime.pictures import Source

Array = NDArray[np.float32]
SOFT = 64
"""The border inside a mask over which given pixels fade out is this part of a picture's side."""


def pasted(images: Array, sources: Sequence[Source]) -> Array:
    """Drawn pictures with the given pixels outside of their masks, byte for byte once they are bytes.

    Args:
        images: (B, 3, H, W) in [0, 1], of which :func:`hart_runtime.runtime.pipeline.to_images` cuts off
            fractions: half a step is added to what is given.
    """
    return np.stack(
        [_pasted(*pair) if pair[1].paste else pair[0] for pair in zip(images, sources, strict=True)]
    )


def _pasted(image: Array, source: Source) -> Array:
    given = (source.pixels.transpose(2, 0, 1) + np.float32(0.5)) / 255
    share = weights(source.drawn)
    return np.where(share > 0, given + (image - given) * share, given).astype(np.float32)


def weights(drawn: NDArray[np.bool_]) -> Array:
    """Of what is drawn, (H, W): 0 outside of a mask, rising from its border on to 1 a few pixels inside.

    The border of the picture is none of the mask's.
    """
    width = len(drawn) // SOFT
    share = drawn.astype(np.float32)
    inside = drawn
    for _ in range(width):
        inside = inside & _shifted(inside)
        share += inside
    return share / np.float32(width + 1)


def _shifted(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether all four neighbours are inside; those beyond the picture are."""
    around = np.pad(inside, 1, constant_values=True)
    return around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
