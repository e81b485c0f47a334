"""Draws scenes: a lit, textured thing on a textured background, 64 x 64 pixels.

Texture is fine and its phase random, so a coarse discrete code cannot hold all of it:
that is what the continuous residual is for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hart_runtime.hart.demo.scenes import PALETTE, Scene

SIZE = 64
SUPERSAMPLING = 3
RADII = {"small": (10.0, 12.5), "": (15.0, 18.5), "large": (21.0, 24.5)}
POLYGONS = {"triangle": (3, 0.5), "square": (4, 0.7071), "star": (5, 0.45)}
"""Corners, and the distance of edge middles (or inner corners) as a share of the radius."""

Array = NDArray[np.float32]


def draw_scene(scene: Scene, rng: np.random.Generator) -> Array:
    """One picture of ``scene``, (64, 64, 3) in [0, 1], sRGB."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    radius = rng.uniform(*RADII[scene.size])
    room = 4 if scene.size != "large" else 2.4
    centre = (SIZE / 2 - 0.5 + rng.uniform(-room, room, 2)).astype(np.float32)
    mask = _mask(scene.shape, centre, radius, rng)[..., None]
    light = rng.uniform(0, 2 * np.pi)
    slope = ((xs - 31.5) * np.cos(light) + (ys - 31.5) * np.sin(light)) / SIZE  # about -0.7 .. 0.7
    background = _surface(scene.background, 0.10 * slope, _grating(xs, ys, rng, 0.045), rng)
    distance = np.hypot(xs - centre[1], ys - centre[0]) / radius
    shade = 0.28 * slope + 0.10 * (0.6 - distance.clip(0, 1.2))
    thing = _surface(scene.color, shade, _grating(xs, ys, rng, 0.06), rng)
    return (background * (1 - mask) + thing * mask).clip(0, 1).astype(np.float32)


def _mask(shape: str, centre: Array, radius: float, rng: np.random.Generator) -> Array:
    """Antialiased coverage of the shape, (64, 64)."""
    n = SIZE * SUPERSAMPLING
    axis = (np.arange(n, dtype=np.float32) + 0.5) / SUPERSAMPLING - 0.5
    dy, dx = axis[:, None] - centre[0], axis[None, :] - centre[1]
    distance = np.hypot(dx, dy)
    if shape == "circle":
        inside = distance < radius * 0.95
    elif shape == "ring":
        inside = (distance < radius) & (distance > radius * 0.52)
    else:
        corners, inner = POLYGONS[shape]
        turn = rng.uniform(-0.25, 0.25) + (np.pi / 4 if shape == "square" else 0)
        sector = np.pi / corners
        angle = np.arctan2(dx, -dy) - turn + sector  # 0 points up
        off_corner = np.abs(np.mod(angle, 2 * sector) - sector)
        # The edge from the corner (radius, 0) to the point at (inner * radius, sector).
        edge_x, edge_y = inner * np.cos(sector) - 1, inner * np.sin(sector)
        reach = edge_y / (edge_y * np.cos(off_corner) - edge_x * np.sin(off_corner))
        grow = {"triangle": 1.15, "square": 1.1, "star": 1.15}[shape]
        inside = distance < radius * grow * reach
    coverage = inside.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING).mean((1, 3))
    return coverage.astype(np.float32)


def _grating(xs: Array, ys: Array, rng: np.random.Generator, amplitude: float) -> Array:
    """Fine woven texture: two gratings, 3.5 to 7 pixels a period, at any angle and phase."""
    pattern = np.zeros_like(xs)
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        frequency = 2 * np.pi / rng.uniform(3.5, 7)
        pattern += np.sin(frequency * (xs * np.cos(angle) + ys * np.sin(angle)) + phase)
    return pattern * (amplitude / np.sqrt(2) * rng.uniform(0.6, 1.2))


def _surface(color: str, shade: Array, texture: Array, rng: np.random.Generator) -> Array:
    base = np.array(PALETTE[color], dtype=np.float32) + rng.uniform(-0.02, 0.02, 3)
    return base * (1 + shade[..., None]) + texture[..., None] + 0.1 * shade[..., None]
