"""The stages of a picture, under which times are measured and operations counted."""

from __future__ import annotations

from collections.abc import Iterable

from hart_runtime.runtime.bundle import TRANSFORMER, UNCONDITIONAL

SAMPLING_GRAPHS = ("sample", "smooth", "next_scale")
DECODER_GRAPHS = ("latent", "decoder")
TEXT_ENCODER = "text encoder"
CONTEXT = "context"
RESIDUAL_CONDITION = "residual condition"
DECODER = "decoder"


def transformer_stage(scale: int) -> str:
    return f"scale {scale} transformer"


def sampling_stage(scale: int) -> str:
    return f"scale {scale} sampling"


def residual_stage(step: int) -> str:
    return f"residual step {step}"


def stages_of(graphs: Iterable[str]) -> list[str]:
    """The stage each graph run of one picture belongs to, from their order."""
    scale, step = -1, -1
    stages = []
    for graph in graphs:
        if graph == TRANSFORMER:
            scale += 1
            stages.append(transformer_stage(scale))
        elif graph == UNCONDITIONAL:
            stages.append(transformer_stage(scale))
        elif graph in SAMPLING_GRAPHS:
            stages.append(sampling_stage(scale))
        elif graph == "residual_step":
            step += 1
            stages.append(residual_stage(step))
        elif graph in DECODER_GRAPHS:
            stages.append(DECODER)
        else:
            stages.append(graph.replace("_", " "))
    return stages
