"""The stages of a picture: under these names times are measured, told to users, and operations counted."""

from __future__ import annotations

import re

LOAD = "load"
TEXT_ENCODER = "text encoder"
CONTEXT = "context"
RESIDUAL_CONDITION = "residual condition"
RESIDUAL = "residual"
SCALE = "scale"
"""What a watcher is told of: a scale, a step of the residual, or the decoder."""
ITERATION = "iteration"
"""The same of models that draw masked tokens: a scale of theirs."""
DRAWS = (SCALE, ITERATION)
"""Steps after which there is more of a picture to show."""
DECODER = "decoder"
ENCODER = "encoder"
"""Of pictures that are given, before anything is drawn."""
TRANSFORMER_PART, SAMPLING_PART, DIFFUSION_PART = "transformer", "sampling", "diffusion"

TRANSFORMER = f"{SCALE} {{index}} {TRANSFORMER_PART}"
SAMPLING = f"{SCALE} {{index}} {SAMPLING_PART}"
RESIDUAL_STEP = f"{RESIDUAL} step {{index}}"
MASKED_TRANSFORMER = f"{ITERATION} {{index}} {TRANSFORMER_PART}"
DIFFUSION = f"{ITERATION} {{index}} {DIFFUSION_PART}"
"""Formats of the stages that a picture has several of."""

_SCALE = re.compile(rf"((?:{SCALE}|{ITERATION}) \d+) ({TRANSFORMER_PART}|{SAMPLING_PART}|{DIFFUSION_PART})")


def scale_and_part(stage: str) -> tuple[str, str] | None:
    """("scale 3", "sampling") of a stage of a scale, or of an iteration; None of any other."""
    found = _SCALE.fullmatch(stage)
    return (found[1], found[2]) if found else None


def summed(seconds: dict[str, float]) -> dict[str, float]:
    """Times by stage, those of all scales and of all denoising steps added up."""
    groups: dict[str, float] = {}
    for stage, value in seconds.items():
        scale = scale_and_part(stage)
        group = scale[1] if scale else RESIDUAL if stage.startswith(RESIDUAL) else stage
        groups[group] = groups.get(group, 0.0) + value
    return groups
