"""Pictures of scenes as a demo's transformer learns them: drawn, and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from hart_runtime.hart.demo.draw import draw_scene
from hart_runtime.hart.demo.scenes import Scene
from hart_runtime.hart.tokenizer import ImageTokenizer

BATCH = 64


class Encoded(NamedTuple):
    """What a tokenizer makes of pictures."""

    indices: list[Tensor]
    """Per scale (N, n * n) int16."""
    rest: Tensor
    """(N, Cv, P, P) float16: the continuous rest before the last scale."""

    def batch(self, chosen: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """Some of them, as losses take them: int64 and float32."""
        return [index[chosen].long() for index in self.indices], self.rest[chosen].float()


def pixels(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Draw scenes as (B, 3, H, W) in [-1, 1]."""
    images = np.stack([draw_scene(scene, rng) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def encoded(
    tokenizer: ImageTokenizer,
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    file: Path,
    device: torch.device,
) -> Encoded:
    """Pictures of scenes, drawn and encoded unless a file holds them already."""
    if not file.is_file():
        parts = []
        with Progress() as progress:
            for start in progress.track(range(0, len(scenes), BATCH), description="encoding"):
                tokens = tokenizer.encode(pixels(scenes[start : start + BATCH], rng).to(device))
                parts.append(([i.short() for i in tokens.indices], tokens.rest.half()))
        indices = [torch.cat(scale) for scale in zip(*(p[0] for p in parts), strict=True)]
        torch.save({"indices": indices, "rest": torch.cat([p[1] for p in parts])}, file)
    return Encoded(**torch.load(file, weights_only=True, map_location=device))
