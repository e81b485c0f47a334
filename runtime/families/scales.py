"""The loop over scales, which every family has: transformer, draw, and the next scale's input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.noise import Noise, pool_size
from hart_runtime.common.schedule import ScaleStep, downsample_matrix, upsample_matrix
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import INT, NEW, OUT, PAST, Contract, Row, Scales
from hart_runtime.runtime.families.family import Conditioning
from hart_runtime.runtime.families.names import DECODER, NEXT_SCALE, SAMPLE, SMOOTH, TRANSFORMER
from hart_runtime.runtime.families.rows import BOTH, LATENTS, NORM, cache, contract, run
from hart_runtime.runtime.program import Arrays, Run
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec

_MAP = ("batch", "side", "side")


def transformer_graph(conditioning: Conditioning) -> Contract:
    """All blocks over the new tokens of a scale."""
    return contract(
        TRANSFORMER,
        (
            Row("x", ("rows", "length", "dim"), recorded="scale{index}.x_in"),
            *conditioning.takes,
            cache(PAST, "past", "rows", "dim"),
        ),
        (
            Row("hidden", ("rows", "length", "dim"), recorded="scale{index}.hidden"),
            cache(NEW, "length", "rows", "dim"),
        ),
        opset=NORM,
        operations="depth * rows * (2 * length * token_weights + 2 * modulation"
        " + 4 * length * (past + length) * dim)",  # q k^T and the weighted sum of v
        bytes="depth * (token_weights + modulation) * weight"
        " + 2 * depth * dim * kept * rows * (past + length) + 8 * rows * length * dim",
        scratch="rows * length * dim * (12 + 10 * unchanged)",
        scores="rows * heads * length * (past + length) * unchanged",
        scales=Scales.ALL,
        attention=True,
        int8=True,
        bfloat16=True,
    )


def drawing_graphs(conditioning: Conditioning) -> tuple[Contract, ...]:
    """Codes of hidden states, and what follows them."""
    taken, made = conditioning.moves
    return (
        contract(
            SAMPLE,
            (
                Row("hidden", (BOTH, "length", "dim"), recorded="scale{index}.hidden"),
                Row("head_condition", (BOTH, "dim"), recorded="head_condition"),
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
        contract(
            SMOOTH,
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
        contract(
            NEXT_SCALE,
            (
                Row("h", (*_MAP, "channels")),
                Row("f_hat", LATENTS, recorded="scale{before}.f_hat"),
                Row("scale", (1,), INT),
                Row("up", ("last", "side")),
                Row("down", ("next_side", "last")),
                *taken,
            ),
            (
                Row(f"f_hat{OUT}", LATENTS, recorded="scale{index}.f_hat"),
                Row("x", (BOTH, "next_side**2", "dim"), recorded="scale{after}.x_in"),
                *made,
            ),
            scales=Scales.BUT_LAST,
            operations="2 * batch * channels * (side**2 * last + side * last**2 + last**2 * next_side"
            " + last * next_side**2 + last**2 * phi) + 2 * batch * next_side**2 * channels * dim",
            bytes="8 * batch * channels * last**2 + channels * dim * weight"
            " + 4 * batch * next_side**2 * (channels + dim)",
        ),
    )


DECODING = contract(
    DECODER,
    (Row("f_hat", LATENTS, recorded="final.f_hat"),),
    (Row("image", ("batch", 3, "pixels", "pixels"), recorded="image"),),
    # From opset 21 on GroupNorm is one operator, which ONNX Runtime makes larger pieces of.
    int8=True,
    bfloat16=True,
    one_by_one=True,  # its full-resolution activations are the largest of all
    operations="batch * decoder_operations",
    bytes="decoder_weights * weight + 12 * batch * pixels**2",
    scratch="4 * batch * decoder_width * pixels**2 * unchanged",
)
DECODE = run(DECODER, 0)


def scale_dims(conditioning: Conditioning, model: ModelSpec, batch: int) -> list[Dims]:
    """Named dimensions at each scale.

    At scale 0 the transformer may have other tokens than the map has cells, and rows for one guidance
    half alone; the last scale has no ``next_side``.
    """
    rows: list[Dims] = []
    past = 0
    for k, side in enumerate(model.patch_nums):
        halves, length = (2, side * side) if k else conditioning.first(model)
        dims = {"batch": batch, "rows": halves * batch, "past": past, "length": length, "side": side}
        dims["pool"] = pool_size(side * side, model.vocab_size)
        if k + 1 < len(model.patch_nums):
            dims["next_side"] = model.patch_nums[k + 1]
        rows.append(dims)
        past += length
    return rows


def codes(now: ScaleStep, model: ModelSpec, settings: SamplingSettings) -> list[Run]:
    """A code for each token, or in smooth mode a mixture of codes."""
    constants: dict[str, NDArray[Any]] = {
        "guidance": np.array(now.guidance, np.float32),
        "top_k": np.array([now.top_k], np.int64),
        "top_p": np.array(now.top_p or 1.0, np.float32),
    }
    sample = run(
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

    return [sample, run(SMOOTH, now.index, temperatures, pool)]


def next_scale(
    now: ScaleStep, following: ScaleStep, conditioning: Conditioning, model: ModelSpec, batch: int
) -> Run:
    """Codes onto f_hat, and the transformer's next input."""
    size, channels = model.patch_nums[-1], model.latent_channels
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array([now.index], np.int64),
        "up": upsample_matrix(now.patch_num, size),
        "down": downsample_matrix(size, following.patch_num),
        **conditioning.places(following, model),
    }
    if not now.index:
        constants["f_hat"] = np.zeros((batch, channels, size, size), np.float32)
    return run(NEXT_SCALE, now.index, constants)


def _as_map(values: NDArray[Any], now: ScaleStep) -> NDArray[Any]:
    """(B, n * n) -> (B, n, n)"""
    return values.reshape(len(values), now.patch_num, now.patch_num)
