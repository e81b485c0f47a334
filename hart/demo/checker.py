"""Looks at a picture and says what is on it, by rules: no network, nothing learned.

Colours are medians of pixels matched to the palette; the shape follows from the outline
of the mask: a hole makes a ring, deep valleys between four arms or more a star, and otherwise the
strongest low harmonic of the outline's radius counts the corners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.hart.demo.scenes import PALETTE, Scene

Array = NDArray[np.float32]
BORDER = 2
CONTRAST = 0.15
"""Colours closer than this (of a palette at least 0.4 apart) are texture, not a thing."""
ROUND = 0.03
"""A relative corner harmonic below this is a circle."""
DIRECTIONS = 90
ARM, VALLEY = 1.06, 0.94
"""Shares of the mean radius: an arm reaches over the one, and ends where it falls below the other."""
DEPTH = 0.68
"""Four arms with valleys lower than this share of their length make a star; a square's sides are at
0.76 and more. Its corner harmonic alone would miss stars whose arms are of unequal length."""


@dataclass(frozen=True)
class Verdict:
    """What the rules found; ``shape`` is None where there is no clear thing."""

    color: str
    shape: str | None
    background: str

    def matches(self, scene: Scene) -> bool:
        """Whether colour, shape and background are those asked for."""
        return (self.color, self.shape, self.background) == (
            scene.color,
            scene.shape,
            scene.background,
        )


def look(image: Array) -> Verdict:
    """Describe a picture, (H, W, 3) in [0, 1]."""
    edge = np.ones(image.shape[:2], dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(image[edge], axis=0)
    distance = np.linalg.norm(_blur(image) - background, axis=-1)
    mask = distance > 0.5 * np.quantile(distance, 0.98)
    core = mask & (distance > 0.6 * np.median(distance[mask]))
    color = np.median(image[core], axis=0)
    if np.linalg.norm(color - background) < CONTRAST:
        return Verdict(_name(color), None, _name(background))
    # With both colours known, every pixel belongs to the nearer one.
    to_color = np.linalg.norm(_blur(image) - color, axis=-1)
    return Verdict(_name(color), _shape(to_color < distance), _name(background))


def _name(color: Array) -> str:
    return min(PALETTE, key=lambda name: float(np.sum((color - np.array(PALETTE[name])) ** 2)))


def _shape(mask: NDArray[np.bool_]) -> str | None:
    ys, xs = np.nonzero(mask)
    if len(ys) < 40 or len(ys) > 0.7 * mask.size:
        return None
    centre_y, centre_x = ys.mean(), xs.mean()
    reach = float(np.hypot(ys - centre_y, xs - centre_x).max())
    radii = np.arange(0, reach + 1.5, 0.5)
    angles = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    rows = (centre_y + radii[:, None] * np.sin(angles)).round().astype(int)
    columns = (centre_x + radii[:, None] * np.cos(angles)).round().astype(int)
    inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    hit = mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)] & inside
    outline = np.where(hit.any(0), radii[hit.shape[0] - 1 - hit[::-1].argmax(0)], 0.0)
    if hit[radii < 0.3 * outline.mean()].mean() < 0.35:
        return "ring"
    smooth = np.convolve(np.pad(outline, 2, mode="wrap"), np.full(5, 0.2), mode="valid")
    low, high = np.quantile(smooth, (0.1, 0.9))
    if _arms(smooth) >= 4 and low < DEPTH * high:
        return "star"
    harmonics = np.abs(np.fft.rfft(outline))[1:6] / outline.sum()
    corners = int(np.argmax(harmonics[2:5])) + 3
    if harmonics[corners - 1] < ROUND:
        return "circle"
    return {3: "triangle", 4: "square", 5: "star"}[corners]


def _arms(outline: NDArray[np.float64]) -> int:
    """How often the radius rises over ARM after it was below VALLEY, once around."""
    mean = outline.mean()
    marks = [r for r in outline if not VALLEY * mean <= r <= ARM * mean]
    outside = [r > mean for r in marks]
    return sum(now and not before for before, now in zip([*outside[-1:], *outside], outside, strict=False))


def _blur(image: Array) -> Array:
    """3 x 3 box filter: texture is finer than any shape."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    shifted = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.mean(shifted, axis=0)
