"""Something to measure editing with: a shape of the demo is to be replaced by another one inside a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.hart.demo.checker import look
from hart_runtime.hart.demo.draw import SIZE, Array, draw_scene
from hart_runtime.hart.demo.scenes import PALETTE, SHAPES, Scene, split_scenes

ROOM = 3
"""Pixels between a shape and its box."""
NONE_LEFT = 0.01
"""Share of a box that may have the old colour: edges between two others are of any colour between them."""


@dataclass(frozen=True)
class Replacement:
    """A picture, a box in it, and what is to stand there."""

    old: Scene
    new: Scene
    picture: Array
    """(H, W, 3) in [0, 1]."""
    box: NDArray[np.bool_]
    """(H, W), True around the old shape."""

    def gone(self, image: Array) -> bool:
        """Whether nothing in the box of a picture has the old colour."""
        names = [*PALETTE]
        colours = np.array([PALETTE[name] for name in names])
        distances = np.square(image[self.box][:, None] - colours).sum(-1)
        return float((distances.argmin(-1) == names.index(self.old.color)).mean()) < NONE_LEFT

    def put(self, image: Array) -> bool:
        """Whether a picture shows the new colour and shape."""
        found = look(image)
        return (found.color, found.shape) == (self.new.color, self.new.shape)


def replacements(count: int, seed: int = 7) -> list[Replacement]:
    """Of held-out pictures, by shapes of another colour and form, of equal size on the same background."""
    _, scenes = split_scenes()
    rng = np.random.default_rng(seed)
    olds = [scenes[i] for i in rng.permutation(np.resize(np.arange(len(scenes)), count))]
    found = []
    for old in olds:
        others = [
            Scene(old.size, color, shape, old.background)
            for color in PALETTE
            for shape in SHAPES
            if color not in (old.color, old.background) and shape != old.shape
        ]
        new = others[int(rng.integers(len(others)))]
        picture = draw_scene(old, rng)
        found.append(Replacement(old, new, picture, _box(picture, old)))
    return found


def _box(picture: Array, scene: Scene) -> NDArray[np.bool_]:
    to_color, to_background = (
        np.square(picture - np.array(PALETTE[name])).sum(-1) for name in (scene.color, scene.background)
    )
    ys, xs = np.nonzero(to_color < to_background)
    box = np.zeros((SIZE, SIZE), np.bool_)
    rows, columns = (slice(max(n.min() - ROOM, 0), n.max() + ROOM + 1) for n in (ys, xs))
    box[rows, columns] = True
    return box


def rates(tasks: Sequence[Replacement], images: Sequence[Array]) -> dict[str, float]:
    """Percent of pictures in which the old shape is gone, and those in which the new one is there."""
    pairs = list(zip(tasks, images, strict=True))
    return {
        "old colour gone": 100 * float(np.mean([task.gone(image) for task, image in pairs])),
        "new colour and shape there": 100 * float(np.mean([task.put(image) for task, image in pairs])),
    }
