"""Small random checkpoints in MAR's published layout."""

from __future__ import annotations

from dataclasses import replace

from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.hart.random_mar import MarShape, write_random_mar

HEADS = (4, 2)
"""Of :data:`SMALL`, whose widths are none of the published ones."""
SMALL = MarShape(
    MarConfig(
        num_classes=7,
        side=4,
        patch=1,
        token_channels=4,
        buffer=3,
        encoder_dim=32,
        encoder_depth=2,
        encoder_heads=HEADS[0],
        encoder_hidden=128,
        decoder_dim=48,
        decoder_depth=1,
        decoder_heads=HEADS[1],
        decoder_hidden=96,
        diff_width=32,
        diff_depth=2,
    ),
    KlConfig(ch=32, ch_mult=(1, 2), z_channels=4),
)

SAMPLING = {"iterations": 5, "steps": "ddim10", "guidance": 2.5}
"""Without the noisiest denoising step, which makes huge tokens of what a random head says."""


def varied(image: dict[str, object] | None = None, **transformer: object) -> MarShape:
    """The small shape with other options."""
    return MarShape(
        replace(SMALL.transformer, **transformer),  # type: ignore[arg-type]
        replace(SMALL.tokenizer, **(image or {})),  # type: ignore[arg-type]
    )


VARIANTS = {
    "patches of four cells": varied(patch=2, token_channels=16),
    "patches of nine cells, one channel": varied({"z_channels": 1}, patch=3, token_channels=9),
    "one buffer token, a picture of one token": varied(buffer=1, side=1),
    "one level, wide channels": varied({"ch": 64, "ch_mult": (1,)}, diff_depth=1, diff_width=48),
    "three levels, narrow ones below": varied({"ch_mult": (2, 1, 2)}, encoder_depth=1, decoder_depth=3),
}

__all__ = ["HEADS", "SAMPLING", "SMALL", "VARIANTS", "MarShape", "varied", "write_random_mar"]
