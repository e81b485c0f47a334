"""The loop of models that draw masked tokens (MAR, arXiv 2406.11838, sections 3.3 and 3.4): in every
iteration a transformer looks at the tokens that are there, and a small diffusion model draws some others.

Which tokens belong to which iteration is each picture's own order; how many is the same for all, so all
shapes follow from the iteration's number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.masking import TokenStep, token_steps
from hart_runtime.common.noise import Noise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.contract import INT, OUT, Contract, Row, Scales
from hart_runtime.runtime.families.names import (
    BEGIN,
    CONTEXT,
    DENOISE,
    LATENT,
    MASKED_TRANSFORMER,
    PLACE,
)
from hart_runtime.runtime.families.rows import BOTH, GUIDED, LATENTS, NORM, contract, run
from hart_runtime.runtime.program import Arrays, Run, Step
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec

LABEL = "label"
"""What a drawing is given: the class of each picture."""
AT_ONCE = 33
"""Denoising steps of one run of their graph, of those after the first: each is a small product, and runs have
a price of their own. Where they do not divide the steps of a drawing, the last run's are filled with some
that change nothing."""
NOTHING = (0, 0, 0, 1, 0, 0)
"""Coefficients of a denoising step that changes nothing if its noise is 0, as those of
:meth:`hart_runtime.common.diffusion_schedule.DiffusionSchedule.unbounded`."""

_TOKENS = ("batch", "grid", "token")
_DRAWN = ("batch", "chosen", "token")
_THERE = ("batch", "grid")
_CONDITION = (GUIDED, "chosen", "decoder_dim")
_EMBEDDED = (GUIDED, "chosen", "width")


def _denoising(steps: int, recorded: str | None = None) -> tuple[Row, ...]:
    """What so many denoising steps take; ``recorded``: where what they begin with is."""
    return (
        Row("x", _DRAWN, recorded=recorded),
        Row("timesteps", (steps,), INT),
        Row("coefficients", (steps, len(NOTHING))),
        Row("guidance", ()),
        Row("noise", (steps, *_DRAWN)),
    )


GRAPHS: tuple[Contract, ...] = (
    contract(
        CONTEXT,
        (Row(LABEL, ("batch",), INT, LABEL),),
        (Row("condition", (BOTH, "dim"), recorded="condition"),),
        drawn=("orders",),
        bytes="8 * batch * dim",
    ),
    contract(
        MASKED_TRANSFORMER,
        (
            Row("tokens", _TOKENS, recorded="step{before}.tokens"),
            Row("condition", (GUIDED, "dim"), recorded="condition"),
            Row("known", ("batch", "past"), INT),
            Row("predicted", ("batch", "chosen"), INT),
        ),
        (Row("z", _CONDITION, recorded="step{index}.z"),),
        opset=NORM,
        scales=Scales.ALL,
        operations="2 * guided * ((buffer + past) * encoder_weights"
        " + (buffer + grid) * filling_weights)"
        " + 4 * guided * (encoder_depth * dim * (buffer + past)**2"
        " + decoder_depth * decoder_dim * (buffer + grid)**2)",
        bytes="(encoder_weights + filling_weights) * block_weight",
        scratch="guided * (buffer + grid) * 12 * (dim + decoder_dim)",
        scores="guided * heads * (buffer + grid)**2 * unchanged",
        attention=True,
        int8=True,
        bfloat16=True,
    ),
    contract(
        BEGIN,
        (
            Row("z", _CONDITION, recorded="step{index}.z"),
            *_denoising(1, "step{index}.diff.init_noise"),
        ),
        (
            Row("embedded", _EMBEDDED, recorded="step{index}.embedded"),
            Row(f"x{OUT}", _DRAWN, recorded="step{index}.diff.after{last}"),
        ),
        scales=Scales.ALL,
        drawn=("step{index}.diff.noise",),
        predicted="step{index}.diff.begun_with",
        exact=True,  # nothing clamps what it makes of its noise, so it multiplies rounding by hundreds
        operations="2 * guided * chosen * (decoder_dim * width + residual_weights)",
        bytes="4 * (decoder_dim * width + residual_weights)",
        scratch="64 * guided * chosen * width",
    ),
    contract(
        DENOISE,
        (Row("embedded", _EMBEDDED, recorded="step{index}.embedded"), *_denoising(AT_ONCE)),
        (Row(f"x{OUT}", _DRAWN, recorded="step{index}.diff.after{last}"),),
        scales=Scales.ALL,
        operations=f"{2 * AT_ONCE} * guided * chosen * residual_weights",
        bytes=f"{AT_ONCE} * residual_weights * weight",
        scratch="64 * guided * chosen * width",
    ),
    contract(
        PLACE,
        (
            Row("tokens", _TOKENS, recorded="step{before}.tokens"),
            Row("there", _THERE, recorded="step{before}.there"),
            Row("x", _DRAWN, recorded="step{index}.sampled"),
            Row("predicted", ("batch", "chosen"), INT),
        ),
        (
            Row(f"tokens{OUT}", _TOKENS, recorded="step{index}.tokens"),
            Row(f"there{OUT}", _THERE, recorded="step{index}.there"),
        ),
        scales=Scales.ALL,
        bytes="8 * batch * grid * token",
    ),
    contract(
        LATENT,
        (Row("tokens", _TOKENS), Row("there", _THERE)),
        (Row("f_hat", LATENTS, recorded="final.f_hat"),),
        bytes="8 * batch * grid * token",
    ),
)


def iterations_of(model: ModelSpec, settings: SamplingSettings) -> tuple[TokenStep, ...]:
    """All of a drawing; raises InputError for settings that have none."""
    tokens = model.num_tokens
    return token_steps(tokens, settings.iterations or tokens, settings.guidance, settings.guidance_schedule)


def _places(now: TokenStep, names: Sequence[str], noise: Noise) -> Arrays:
    """Which tokens are ``known`` before an iteration, and which it predicts."""
    orders = noise.order(now.tokens)
    found = {"known": now.known_places(orders), "predicted": now.predicted_places(orders)}
    return {name: found[name] for name in names}


def dims(model: ModelSpec, settings: SamplingSettings, batch: int) -> list[Dims]:
    """The free dimensions at each iteration."""
    return [
        {
            "batch": batch,
            "guided": 2 * batch if now.guided else batch,
            "past": now.known,
            "chosen": now.predicted,
        }
        for now in iterations_of(model, settings)
    ]


def steps(model: ModelSpec, settings: SamplingSettings, batch: int, edited: bool) -> tuple[Step, ...]:
    """Every iteration, and the latent that is decoded at the end.

    Before the last one a picture's tokens that are not there are shown as the mean of those that are.
    """
    latent = run(LATENT, 0)
    todo = iterations_of(model, settings)
    found = []
    for now in todo:
        runs = (*_first(now, model, batch), *_denoised(now, model, settings))
        found.append(
            Step(stages.ITERATION, now.index, len(todo), (*runs, _placed(now, model, batch)), (latent,))
        )
    return (*found, Step(stages.DECODER, 0, 1, (latent,), ()))


def _first(now: TokenStep, model: ModelSpec, batch: int) -> list[Run]:
    """Until what is known of the tokens that are to be drawn."""
    places = functools.partial(_places, now, ("known", "predicted"))
    transformer = run(MASKED_TRANSFORMER, now.index, _nothing_yet(now, model, batch, "tokens"), places)
    if now.index:
        return [transformer]
    if not now.guided:
        transformer = replace(transformer, halved=frozenset({"condition"}))
    return [run(CONTEXT, 0), transformer]


def _denoised(now: TokenStep, model: ModelSpec, settings: SamplingSettings) -> list[Run]:
    """The diffusion of the tokens of an iteration."""
    schedule = diffusion_schedule(settings.steps)
    count, channels = len(schedule), model.latent_channels * model.patch**2
    padding = (1 - count) % AT_ONCE
    timesteps = np.append(schedule.timesteps[::-1], np.zeros(padding, np.int64))
    coefficients = [schedule.unbounded(index) for index in reversed(range(count))]
    table = np.array([*coefficients, *[NOTHING] * padding], np.float32)
    # Written as in HART's residual, where 0 is no guidance.
    guidance = np.array(now.guidance - 1, np.float32)

    def random(first: int, steps: int, noise: Noise) -> Arrays:
        drawn = noise.token_steps(now.index, count, now.predicted, channels).swapaxes(0, 1)
        filled = np.zeros((steps, *drawn.shape[1:]), np.float32)
        noisy = drawn[first : min(first + steps, count - 1)]  # the last step adds none
        np.multiply(noisy, np.float32(settings.temperature), out=filled[: len(noisy)])
        start = {} if first else {"x": noise.token_start(now.index, now.predicted, channels)}
        return {**start, "noise": filled}

    found = []
    for first in (0, *range(1, count + padding, AT_ONCE)):
        steps = AT_ONCE if first else 1
        constants: dict[str, NDArray[Any]] = {
            "timesteps": timesteps[first : first + steps],
            "coefficients": table[first : first + steps],
            "guidance": guidance,
        }
        graph = DENOISE if first else BEGIN
        denoised = run(graph, now.index, constants, functools.partial(random, first, steps))
        found.append(replace(denoised, last=min(first + steps, count) - 1))
    return found


def _placed(now: TokenStep, model: ModelSpec, batch: int) -> Run:
    places = functools.partial(_places, now, ("predicted",))
    return run(PLACE, now.index, _nothing_yet(now, model, batch, "tokens", "there"), places)


def _nothing_yet(now: TokenStep, model: ModelSpec, batch: int, *names: str) -> Arrays:
    """What the first iteration finds."""
    if now.index:
        return {}
    sizes = model.sizes
    shapes: Mapping[str, tuple[int, ...]] = {
        "tokens": (batch, sizes["grid"], sizes["token"]),
        "there": (batch, sizes["grid"]),
    }
    return {name: np.zeros(shapes[name], np.float32) for name in names}
