"""What the demo can be asked for: scenes, their captions, and which are held out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.13),
    "green": (0.13, 0.64, 0.24),
    "blue": (0.13, 0.27, 0.88),
    "yellow": (0.97, 0.90, 0.16),
    "purple": (0.55, 0.16, 0.70),
    "orange": (0.97, 0.53, 0.08),
    "black": (0.07, 0.07, 0.07),
    "white": (0.95, 0.95, 0.95),
    "gray": (0.50, 0.50, 0.50),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("", "small", "large")
HELD_OUT_SHARE = 0.12
CLASSES = tuple(f"{color} {shape}" for color, shape in itertools.product(PALETTE, SHAPES))
"""What the demo of classes draws, of any size and on any background, in the order of their numbers."""


@dataclass(frozen=True)
class Scene:
    """One thing on a background of another colour."""

    size: str
    """"small", "large", or "" for the size in between."""
    color: str
    shape: str
    background: str

    @property
    def label(self) -> int:
        """Its number among :data:`CLASSES`."""
        return CLASSES.index(f"{self.color} {self.shape}")

    def caption(self) -> str:
        """The prompt in its plain form."""
        size = f"{self.size} " if self.size else ""
        return f"a {size}{self.color} {self.shape} on a {self.background} background"

    def variant(self, rng: np.random.Generator) -> str:
        """The same request in one of several word orders."""
        size = f"{self.size} " if self.size else ""
        thing = f"{size}{self.color} {self.shape}"
        forms = (
            f"{thing} on {self.background}",
            f"{thing}, {self.background} background",
            f"on a {self.background} background, a {thing}",
            f"a {self.background} background with a {thing}",
            f"the {thing} on the {self.background} background",
        )
        return forms[rng.integers(len(forms))]


def all_scenes() -> list[Scene]:
    """Every combination in which the thing can be told from its background."""
    return [
        Scene(size, color, shape, background)
        for size, color, shape, background in itertools.product(SIZES, PALETTE, SHAPES, PALETTE)
        if color != background
    ]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(training, held out); the split is fixed, so that every number refers to the same one."""
    scenes = all_scenes()
    order = np.random.default_rng(20241014).permutation(len(scenes))
    cut = round(len(scenes) * HELD_OUT_SHARE)
    held_out = set(order[:cut].tolist())
    training = [s for i, s in enumerate(scenes) if i not in held_out]
    return training, [scenes[i] for i in sorted(held_out)]
