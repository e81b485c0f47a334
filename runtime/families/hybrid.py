"""Tokens with a continuous residual, which a small diffusion model draws (arXiv 2410.10812, section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.noise import Noise
from hart_runtime.common.schedule import ScaleStep, residual_guidance
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.contract import INT, OUT, Row
from hart_runtime.runtime.families.family import Tokens
from hart_runtime.runtime.families.names import LATENT, RESIDUAL_CONDITION, RESIDUAL_STEP
from hart_runtime.runtime.families.operators import HYBRID as OPERATORS
from hart_runtime.runtime.families.rows import CODES, GUIDED, LATENTS, NORM, contract, run
from hart_runtime.runtime.families.sizes import residual_sizes
from hart_runtime.runtime.program import Arrays, Run, Step
from hart_runtime.runtime.spec import ModelSpec

_REST = ("batch", "cells", "channels")

_GRAPHS = (
    contract(
        RESIDUAL_CONDITION,
        (
            Row("hidden", (GUIDED, "cells", "dim"), recorded="scale{before}.hidden"),
            Row("codes", CODES, recorded="scale{before}.codes"),
        ),
        (Row("embedded", (GUIDED, "cells", "width"), recorded="final.diff.embedded"),),
        opset=NORM,
        int8=True,
        operations="2 * batch * cells * channels * dim + 2 * guided * cells * dim * width",
        bytes="(channels * dim + dim * width) * weight + 4 * batch * cells * (channels + dim)"
        " + 4 * guided * cells * (dim + width)",
    ),
    contract(
        RESIDUAL_STEP,
        (
            Row("residual", _REST, recorded="final.diff.step{index}.x_t"),
            Row("embedded", (GUIDED, "cells", "width"), recorded="final.diff.embedded"),
            Row("timestep", (1,), INT, "final.diff.step{index}.t_net"),
            Row("coefficients", (7,)),
            Row("guidance", ()),
            Row("noise", _REST, recorded="final.diff.step{index}.noise"),
        ),
        (Row(f"residual{OUT}", _REST, recorded="final.diff.step{index}.sample"),),
        int8=True,
        predicted="final.diff.step{index}.model_out",
        operations="2 * guided * cells * residual_weights",
        bytes="residual_weights * weight + 4 * guided * cells * width + 12 * batch * cells * channels",
        scratch="64 * batch * cells * width",
    ),
    contract(
        LATENT,
        (
            Row("f_hat", LATENTS, recorded="scale{before}.f_hat"),
            Row("h", CODES),
            Row("residual", _REST),
        ),
        (Row(f"f_hat{OUT}", LATENTS, recorded="final.f_hat"),),
        bytes="8 * batch * cells * channels",
    ),
)


def _end(
    model: ModelSpec, settings: SamplingSettings, batch: int, scales: Sequence[ScaleStep]
) -> tuple[list[Step], Run, Run]:
    rest = (batch, model.patch_nums[-1] ** 2, model.latent_channels)
    without = run(LATENT, len(scales), {"residual": np.zeros(rest, np.float32)})
    if not settings.residual:
        return [], without, without
    return _residual(scales, settings.steps, rest, without), run(LATENT, len(scales)), without


def _residual(
    scales: Sequence[ScaleStep], respacing: str, rest: tuple[int, int, int], without: Run
) -> list[Step]:
    """Denoising steps, from noise."""
    schedule = diffusion_schedule(respacing)
    guidance = np.array(residual_guidance(scales[-1]), np.float32)

    def random(number: int, noise: Noise) -> Arrays:
        start = {} if number else {"residual": noise.residual_start(*rest[1:])}
        return {**start, "noise": noise.residual_step(number, *rest[1:])}

    found = []
    for number, index in enumerate(reversed(range(len(schedule)))):
        constants: dict[str, NDArray[Any]] = {
            "timestep": schedule.timesteps[index : index + 1],
            "coefficients": schedule.coefficients(index),
            "guidance": guidance,
        }
        step = run(RESIDUAL_STEP, number, constants, functools.partial(random, number))
        runs = (step,) if number else (run(RESIDUAL_CONDITION, len(scales)), step)
        found.append(Step(stages.RESIDUAL, number, len(schedule), runs, (without,)))
    return found


HYBRID = Tokens(
    hybrid=True,
    graphs=_GRAPHS,
    end=_end,
    edited=("f_hat", "h", "residual"),
    own=frozenset({"diff_width"}),
    describe=lambda llm: {"diff_width": llm.diff_width},
    sizes=residual_sizes,
    lacks={},
    operators=OPERATORS,
)
