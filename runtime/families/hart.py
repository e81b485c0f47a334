"""HART: text, a transformer over scales, and a residual diffusion (arXiv 2410.10812, section 3).

What the graphs are, which of them a picture needs in which order, and what the host feeds them: the
loop of :mod:`hart_runtime.hart.generate`, cut where the host has a decision to make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.checkpoint import LLM, TOKENIZER
from hart_runtime.common.checkpoint import TEXT_ENCODER as TEXT_NETWORK
from hart_runtime.common.config import (
    TextEncoderConfig,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
)
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.noise import Noise, pool_size
from hart_runtime.common.schedule import (
    ScaleStep,
    cell_axis,
    downsample_matrix,
    residual_guidance,
    scale_steps,
    upsample_matrix,
)
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.contract import (
    BOOL,
    CACHE,
    INT,
    NEW,
    OUT,
    PAST,
    Contract,
    Dimension,
    Row,
    Scales,
    cache_names,
)
from hart_runtime.runtime.families.family import Family
from hart_runtime.runtime.families.names import (
    CONTEXT,
    DECODER,
    LATENT,
    NEXT_SCALE,
    RESIDUAL_CONDITION,
    RESIDUAL_STEP,
    SAMPLE,
    SMOOTH,
    TEXT_ENCODER,
    TOKEN_IDS,
    TRANSFORMER,
    UNCONDITIONAL,
)
from hart_runtime.runtime.families.operators import operators_of
from hart_runtime.runtime.families.sizes import text_encoder_sizes, tokenizer_sizes, transformer_sizes
from hart_runtime.runtime.program import Arrays, Run, Step, none
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec

NAME = "hart"

_TEXT, _BOTH, _MAP = ("batch", "tokens"), "2*batch", ("batch", "side", "side")
_LATENTS, _REST = ("batch", "channels", "last", "last"), ("batch", "cells", "channels")
_CODES = ("batch", "last", "last", "channels")


def _cache(prefix: str, *shape: Dimension) -> Row:
    return Row(prefix, shape, CACHE, "kv.block{block}.{part}", blocks=True)


NORM = 23
"""Opset of graphs with RMSNormalization."""

_GRAPHS = (
    Contract(
        TEXT_ENCODER,
        stages.TEXT_ENCODER,
        (Row(TOKEN_IDS, _TEXT, INT, TOKEN_IDS), Row("mask", _TEXT, BOOL, "ctx.mask")),
        (Row("features", (*_TEXT, "context_dim"), recorded="ctx.features"),),
        opset=NORM,
        operations="batch * (2 * tokens * text_weights + 4 * tokens**2 * text_width)",
        bytes="(text_weights + batch * tokens * context_dim) * unchanged + 4 * batch * tokens * context_dim",
        scratch="batch * tokens * context_dim * (12 + 10 * unchanged)",
        scores="batch * text_heads * tokens**2 * unchanged",
        one_by_one=True,  # equal prompts are encoded once
    ),
    Contract(
        CONTEXT,
        stages.CONTEXT,
        (
            Row("features", (*_TEXT, "context_dim"), recorded="ctx.features"),
            Row("mask", _TEXT, BOOL, "ctx.mask"),
        ),
        (
            Row("x", (*_TEXT, "dim"), recorded="scale0.x_in"),
            Row("angles", (*_TEXT, "head"), recorded="scale0.angles"),
            Row("offset", (_BOTH, 1), recorded="offset"),
            Row("head_condition", (_BOTH, "dim"), recorded="head_condition"),
            Row("block_condition", ("batch", "dim"), recorded="block_condition", modulated=True),
        ),
        opset=NORM,
        operations="2 * batch * tokens * context_dim * dim + 8 * batch * dim**2",
        # The second product is the head norm's: its condition is the same at every scale.
        bytes="(context_dim * dim + 2 * dim**2) * weight"
        " + 4 * batch * tokens * (context_dim + dim) + 24 * batch * dim",
    ),
    # The text runs in the conditional half alone.
    Contract(
        TRANSFORMER,
        stages.TRANSFORMER,
        (
            Row("x", ("rows", "length", "dim"), recorded="scale{index}.x_in"),
            Row("angles", ("rows", "length", "head"), recorded="scale{index}.angles"),
            Row("block_condition", ("rows", "dim"), recorded="block_condition", modulated=True),
            _cache(PAST, "past", "rows", "dim"),
        ),
        (
            Row("hidden", ("rows", "length", "dim"), recorded="scale{index}.hidden"),
            _cache(NEW, "length", "rows", "dim"),
        ),
        opset=NORM,
        operations="depth * rows * (2 * length * token_weights + 2 * modulation"
        " + 4 * length * (past + length) * dim)",  # q k^T and the weighted sum of v
        bytes="depth * (token_weights + modulation) * weight"
        " + 2 * depth * dim * unchanged * rows * (past + length) + 8 * rows * length * dim",
        scratch="rows * length * dim * (12 + 10 * unchanged)",
        scores="rows * heads * length * (past + length) * unchanged",
        scales=Scales.ALL,
        attention=True,
        int8=True,
        bfloat16=True,
    ),
    # Puts the constant unconditional half beside what the transformer made of the text.
    Contract(
        UNCONDITIONAL,
        stages.TRANSFORMER,
        (
            Row("hidden", (*_TEXT, "dim"), recorded="scale{index}.hidden"),
            Row("block_condition", ("batch", "dim"), recorded="block_condition", modulated=True),
            _cache(NEW, "tokens", "batch", "dim"),
        ),
        (
            Row(f"hidden{OUT}", (_BOTH, "tokens", "dim"), recorded="scale{index}.hidden"),
            Row(f"block_condition{OUT}", (_BOTH, "dim"), recorded="block_condition", modulated=True),
            _cache(PAST, "tokens", _BOTH, "dim"),
        ),
    ),
    Contract(
        SAMPLE,
        stages.SAMPLING,
        (
            Row("hidden", (_BOTH, "length", "dim"), recorded="scale{index}.hidden"),
            Row("head_condition", (_BOTH, "dim"), recorded="head_condition"),
            Row("guidance", (), recorded="scale{index}.cfg_t"),
            Row("top_k", (1,), INT, decides=True),
            Row("top_p", ()),
            Row("uniform", _MAP, recorded="scale{index}.u"),
        ),
        (
            Row("index", _MAP, INT, "scale{index}.idx"),
            Row("codes", (*_MAP, "channels"), recorded="scale{index}.codes"),
            Row("logits", (*_MAP, "vocab"), recorded="scale{index}.logits_kept"),
        ),
        opset=NORM,
        scales=Scales.ALL,
        # Logits are nobody else's: they stay inside.
        operations="2 * batch * side**2 * dim * vocab",
        bytes="dim * vocab * weight + 8 * batch * side**2 * dim + 4 * vocab * channels",
        scratch="batch * side**2 * (16 * vocab + 8 * dim)",
        int8=True,
    ),
    Contract(
        SMOOTH,
        stages.SAMPLING,
        (
            Row("logits", (*_MAP, "vocab"), recorded="scale{index}.logits_kept"),
            Row("exponential", ("batch", "pool"), recorded="scale{index}.gumbel_exp"),
            Row("starts", _MAP, INT),
            Row("logit_gain", ()),
            Row("temperature", ()),
        ),
        (Row("h", (*_MAP, "channels"), recorded="scale{index}.h_smooth"),),
        scales=Scales.ALL,
        replayed={"pool": "side**2 * vocab"},  # a number for every code of every token
        operations="2 * batch * side**2 * vocab * channels",
        bytes="4 * batch * pool + 8 * batch * side**2",
        scratch="12 * batch * side**2 * vocab",
    ),
    Contract(
        NEXT_SCALE,
        stages.SAMPLING,
        (
            Row("h", (*_MAP, "channels")),
            Row("f_hat", _LATENTS, recorded="scale{before}.f_hat"),
            Row("scale", (1,), INT),
            Row("up", ("last", "side")),
            Row("down", ("next_side", "last")),
            Row("positions", ("next_side",)),
            Row("offset", (_BOTH, 1), recorded="offset"),
        ),
        (
            Row(f"f_hat{OUT}", _LATENTS, recorded="scale{index}.f_hat"),
            Row("x", (_BOTH, "next_side**2", "dim"), recorded="scale{after}.x_in"),
            Row("angles", (_BOTH, "next_side**2", "head"), recorded="scale{after}.angles"),
        ),
        scales=Scales.BUT_LAST,
        operations="2 * batch * channels * (side**2 * last + side * last**2 + last**2 * next_side"
        " + last * next_side**2 + last**2 * phi) + 2 * batch * next_side**2 * channels * dim",
        bytes="8 * batch * channels * last**2 + channels * dim * weight"
        " + 4 * batch * next_side**2 * (channels + dim)",
    ),
    Contract(
        RESIDUAL_CONDITION,
        stages.RESIDUAL_CONDITION,
        (
            Row("hidden", (_BOTH, "cells", "dim"), recorded="scale{before}.hidden"),
            Row("codes", _CODES, recorded="scale{before}.codes"),
        ),
        (Row("embedded", (_BOTH, "cells", "width"), recorded="final.diff.embedded"),),
        opset=NORM,
        int8=True,
        operations="2 * batch * cells * channels * dim + 4 * batch * cells * dim * width",
        bytes="(channels * dim + dim * width) * weight + 4 * batch * cells * (channels + dim)"
        " + 8 * batch * cells * (dim + width)",
    ),
    Contract(
        RESIDUAL_STEP,
        stages.RESIDUAL_STEP,
        (
            Row("residual", _REST, recorded="final.diff.step{index}.x_t"),
            Row("embedded", (_BOTH, "cells", "width"), recorded="final.diff.embedded"),
            Row("timestep", (1,), INT, "final.diff.step{index}.t_net"),
            Row("coefficients", (7,)),
            Row("guidance", ()),
            Row("noise", _REST, recorded="final.diff.step{index}.noise"),
        ),
        (Row(f"residual{OUT}", _REST, recorded="final.diff.step{index}.sample"),),
        int8=True,
        predicted="final.diff.step{index}.model_out",
        operations="4 * batch * cells * residual_weights",
        bytes="residual_weights * weight + 8 * batch * cells * width + 12 * batch * cells * channels",
        scratch="64 * batch * cells * width",
    ),
    Contract(
        LATENT,
        stages.DECODER,
        (
            Row("f_hat", _LATENTS, recorded="scale{before}.f_hat"),
            Row("h", _CODES),
            Row("residual", _REST),
        ),
        (Row(f"f_hat{OUT}", _LATENTS, recorded="final.f_hat"),),
        bytes="8 * batch * cells * channels",
    ),
    Contract(
        DECODER,
        stages.DECODER,
        (Row("f_hat", _LATENTS, recorded="final.f_hat"),),
        (Row("image", ("batch", 3, "pixels", "pixels"), recorded="image"),),
        # From opset 21 on GroupNorm is one operator, which ONNX Runtime makes larger pieces of.
        bfloat16=True,
        one_by_one=True,  # its full-resolution activations are the largest of all
        operations="batch * decoder_operations",
        bytes="decoder_weights * unchanged + 12 * batch * pixels**2",
        scratch="4 * batch * decoder_width * pixels**2 * unchanged",
    ),
)
GRAPHS = {graph.name: replace(graph, operators=operators_of(graph.name, graph.int8)) for graph in _GRAPHS}
"""In the order in which a picture needs them."""


def describe_model(
    llm: TransformerConfig, tokenizer: TokenizerConfig, patch_nums: tuple[int, ...]
) -> ModelSpec:
    """Sizes of a model from its configurations."""
    return ModelSpec(
        patch_nums=patch_nums,
        depth=llm.depth,
        embed_dim=llm.embed_dim,
        num_heads=llm.num_heads,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.z_channels,
        image_size=patch_nums[-1] * tokenizer.downsample,
        context_token=llm.context_token,
        context_dim=llm.context_dim,
        diff_width=llm.diff_width,
        modulated=llm.modulated,
    )


def sizes(model: ModelSpec, configurations: Mapping[str, Any]) -> dict[str, int]:
    """What formulas need beside the model's sizes; without a text encoder nothing of one."""
    llm = config_from_dict(TransformerConfig, configurations[LLM], "manifest")
    image = config_from_dict(TokenizerConfig, configurations[TOKENIZER], "manifest")
    found = {"depth": model.depth, **transformer_sizes(llm, image.z_channels)}
    found |= tokenizer_sizes(image, model.patch_nums[-1])
    if configurations.get(TEXT_NETWORK):
        text = config_from_dict(TextEncoderConfig, configurations[TEXT_NETWORK], "manifest")
        found |= text_encoder_sizes(text)
    return found


def scale_dims(model: ModelSpec, batch: int) -> list[Dims]:
    """Named dimensions at each scale.

    Scale 0 runs the text through the transformer, so it has as many new tokens as the text, and
    rows for the conditional half alone; the last scale has no ``next_side``.
    """
    rows: list[Dims] = []
    past = 0
    for k, side in enumerate(model.patch_nums):
        length = model.context_token if k == 0 else side * side
        halves = 1 if k == 0 else 2
        dims = {"batch": batch, "rows": halves * batch, "past": past, "length": length, "side": side}
        dims["pool"] = pool_size(side * side, model.vocab_size)
        if k + 1 < len(model.patch_nums):
            dims["next_side"] = model.patch_nums[k + 1]
        rows.append(dims)
        past += length
    return rows


def steps(model: ModelSpec, settings: SamplingSettings, batch: int) -> tuple[Step, ...]:
    """Every scale, every denoising step of the residual, and the latent that is decoded last."""
    scales = scale_steps(model.patch_nums, settings, model.vocab_size)
    rest = (batch, model.patch_nums[-1] ** 2, model.latent_channels)
    nothing = {"residual": np.zeros(rest, np.float32)}
    without = _run(LATENT, len(scales), nothing)  # the picture before its residual is drawn
    found = []
    for now in scales:
        following = scales[now.index + 1] if now is not scales[-1] else None
        runs = (*_hidden(now, model, batch), *_codes(now, model, settings))
        if following is not None:
            runs = (*runs, _next_scale(now, following, model, batch))
            found.append(Step(stages.SCALE, now.index, len(scales), runs, ()))
        else:
            found.append(Step(stages.SCALE, now.index, len(scales), runs, (without,)))
    if settings.residual:
        found += _residual(scales, settings.steps, rest, without)
    whole = _run(LATENT, len(scales)) if settings.residual else without
    return (*found, Step(stages.DECODER, 0, 1, (whole,), ()))


def _run(
    graph: str, index: int, constants: Arrays | None = None, random: Callable[[Noise], Arrays] = none
) -> Run:
    return Run(graph, GRAPHS[graph].stage.format(index=index), index, constants or {}, random)


def _hidden(now: ScaleStep, model: ModelSpec, batch: int) -> list[Run]:
    """The transformer; before the first scale it is given the text."""
    if now.index:
        return [_run(TRANSFORMER, now.index)]
    empty = np.zeros((0, batch, model.embed_dim), np.float32)
    cache = {PAST + name: empty for name in cache_names(model.depth)}
    return [_run(CONTEXT, 0), _run(TRANSFORMER, 0, cache), _run(UNCONDITIONAL, 0)]


def _codes(now: ScaleStep, model: ModelSpec, settings: SamplingSettings) -> list[Run]:
    """A code for each token, or in smooth mode a mixture of codes."""
    constants: dict[str, NDArray[Any]] = {
        "guidance": np.array(now.guidance, np.float32),
        "top_k": np.array([now.top_k], np.int64),
        "top_p": np.array(now.top_p or 1.0, np.float32),
    }
    sample = _run(
        SAMPLE,
        now.index,
        constants,
        lambda noise: {"uniform": _as_map(noise.uniform(now.index, now.num_tokens), now)},
    )
    if not settings.smooth:
        return [replace(sample, also={"h": "codes"})]
    temperatures = {
        "logit_gain": np.array(now.logit_gain, np.float32),
        "temperature": np.array(now.temperature, np.float32),
    }

    def pool(noise: Noise) -> Arrays:
        exponential, start = noise.exponential(now.index, now.num_tokens, model.vocab_size)
        return {"exponential": exponential, "starts": _as_map(start, now)}

    return [sample, _run(SMOOTH, now.index, temperatures, pool)]


def _next_scale(now: ScaleStep, following: ScaleStep, model: ModelSpec, batch: int) -> Run:
    size, channels = model.patch_nums[-1], model.latent_channels
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array([now.index], np.int64),
        "up": upsample_matrix(now.patch_num, size),
        "down": downsample_matrix(size, following.patch_num),
        "positions": cell_axis(following.patch_num, size),
    }
    if not now.index:
        constants["f_hat"] = np.zeros((batch, channels, size, size), np.float32)
    return _run(NEXT_SCALE, now.index, constants)


def _residual(
    scales: Sequence[ScaleStep], respacing: str, rest: tuple[int, int, int], without: Run
) -> list[Step]:
    """Denoising steps, from noise. The last adds none, by its gate, and is given zeros for it."""
    schedule = diffusion_schedule(respacing)
    guidance = np.array(residual_guidance(scales[-1]), np.float32)

    def random(number: int, noise: Noise) -> Arrays:
        start = {} if number else {"residual": noise.residual_start(*rest[1:])}
        more = {"noise": noise.residual_step(number, *rest[1:])} if number < last else {}
        return {**start, **more}

    found, last = [], len(schedule) - 1
    for number, index in enumerate(reversed(range(len(schedule)))):
        constants: dict[str, NDArray[Any]] = {
            "timestep": schedule.timesteps[index : index + 1],
            "coefficients": schedule.coefficients(index),
            "guidance": guidance,
        }
        if number == last:
            constants["noise"] = np.zeros(rest, np.float32)
        run = _run(RESIDUAL_STEP, number, constants, functools.partial(random, number))
        runs = (run,) if number else (_run(RESIDUAL_CONDITION, len(scales)), run)
        found.append(Step(stages.RESIDUAL, number, len(schedule), runs, (without,)))
    return found


def _as_map(values: NDArray[Any], now: ScaleStep) -> NDArray[Any]:
    """(B, n * n) -> (B, n, n)"""
    return values.reshape(len(values), now.patch_num, now.patch_num)


HART = Family(NAME, GRAPHS, scale_dims, steps, sizes, Run(DECODER, stages.DECODER))
