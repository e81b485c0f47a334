"""The loop over scales, which every family has: transformer, draw, and the next scale's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.noise import Noise, pool_size
from hart_runtime.common.pruning import SOURCES, sources
from hart_runtime.common.schedule import ScaleStep, downsample_matrix, upsample_matrix
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import (
    BRANCH,
    BRANCHES,
    CACHE,
    CACHED,
    INT,
    MEMORY,
    NEW,
    OUT,
    PAST,
    Contract,
    Row,
    Scales,
    names_of,
)
from hart_runtime.runtime.families.family import Conditioning
from hart_runtime.runtime.families.names import (
    CODED,
    CODES,
    DECODER,
    ENCODER,
    FAST,
    IMAGE,
    INDEX,
    LATENT,
    NEXT_SCALE,
    SAMPLE,
    SMOOTH,
    TRANSFORMER,
)
from hart_runtime.runtime.families.rows import BOTH, GUIDED, LATENTS, NORM, SCALE_KEYS, cache, contract, run
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
        bytes="depth * (token_weights * block_weight + modulation * weight)"
        " + 2 * depth * dim * kept * rows * (past + length) + 8 * rows * length * dim",
        scratch="rows * length * dim * (12 + 10 * unchanged)",
        scores="rows * heads * length * (past + length) * unchanged",
        scales=Scales.ALL,
        attention=True,
        int8=True,
        fp8=True,
        bfloat16=True,
    )


def fast_graph(conditioning: Conditioning) -> Contract:
    """The same with less to do: a part of the tokens, or of the cache the conditional half alone."""
    return contract(
        FAST,
        (
            Row("x", ("rows", "length", "dim"), recorded="scale{index}.x_in"),
            *conditioning.takes,
            Row("taking_part", ("chosen",), INT, prunable=True),
            Row("sources", (SOURCES, "length"), INT, prunable=True),
            Row(MEMORY, ("cached", "remembered", "dim"), CACHE, prunable=True, blocks=BRANCHES),
            Row(PAST, ("past", "cached", "dim"), CACHE, blocks=CACHED),
        ),
        (
            Row("hidden", ("rows", "length", "dim"), recorded="scale{index}.hidden"),
            Row(
                BRANCH,
                ("cached", "length", "dim"),
                CACHE,
                "scale{index}.block{block}.{kind}.out",
                prunable=True,
                blocks=BRANCHES,
            ),
            Row(NEW, ("chosen", "cached", "dim"), CACHE, SCALE_KEYS, prunable=True, blocks=CACHED),
            Row(NEW, ("length", "cached", "dim"), CACHE, SCALE_KEYS, prunable=False, blocks=CACHED),
        ),
        opset=NORM,
        operations="depth * rows * (2 * chosen * token_weights + 2 * modulation"
        " + 4 * chosen * (past + chosen) * dim)",
        bytes="depth * (token_weights * block_weight + modulation * weight)"
        " + 2 * depth * dim * kept * rows * (past + chosen) + 8 * rows * length * dim",
        scratch="rows * length * dim * (12 + 10 * unchanged)",
        scores="rows * heads * chosen * (past + chosen) * unchanged",
        scales=Scales.ALL,
        on_demand=True,
        engine=False,
        attention=True,
        int8=True,
        fp8=True,
        bfloat16=True,
    )


def drawing_graphs(conditioning: Conditioning) -> tuple[Contract, ...]:
    """Codes of hidden states, and what follows them."""
    taken, made = conditioning.moves
    return (
        contract(
            SAMPLE,
            (
                Row("hidden", (GUIDED, "length", "dim"), recorded="scale{index}.hidden"),
                Row("head_condition", (GUIDED, "dim"), recorded="head_condition"),
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
ENCODING = contract(
    ENCODER,
    (Row(IMAGE, ("batch", 3, "pixels", "pixels"), recorded="given.image"),),
    (
        Row(LATENT, LATENTS, recorded="given.latent"),
        Row(INDEX, ("batch", "pyramid"), INT, "given.idx"),
        Row(CODES, ("batch", "pyramid", "channels"), recorded="given.codes"),
        Row(CODED, LATENTS, recorded="given.coded"),
    ),
    on_demand=True,
    optional=True,
    one_by_one=True,  # as the decoder
    operations="batch * encoder_operations",
    bytes="encoder_weights * unchanged + 12 * batch * pixels**2",
    scratch="4 * batch * decoder_width * pixels**2 * unchanged",
)
"""Pixels in [-1, 1] to their latent, to indices and codes of all scales, one behind the other, and to the
latent that these codes make."""
ENCODE_PICTURES = run(ENCODER, 0)


def scale_dims(
    conditioning: Conditioning, model: ModelSpec, scales: Sequence[ScaleStep], batch: int
) -> list[Dims]:
    """Named dimensions at each scale.

    At scale 0 the transformer may have other tokens than the map has cells, and rows for one guidance
    half alone; the last scale has no ``next_side``.
    """
    rows: list[Dims] = []
    past, remembered = 0, 1
    for now in scales:
        side = now.patch_num
        halves, length = _first_or_both(conditioning, model, now)
        chosen = now.kept or length
        guided = 2 if now.guided else 1
        dims = {"batch": batch, "past": past, "length": length, "chosen": chosen, "side": side}
        dims |= {"rows": min(halves, guided) * batch, "cached": halves * batch, "guided": guided * batch}
        dims |= {
            "pool": pool_size(side * side, model.vocab_size),
            "remembered": remembered if now.kept else 1,
        }
        if now is not scales[-1]:
            dims["next_side"] = scales[now.index + 1].patch_num
        rows.append(dims)
        past += chosen
        remembered = length if now.remembered else remembered
    return rows


def _first_or_both(conditioning: Conditioning, model: ModelSpec, now: ScaleStep) -> tuple[int, int]:
    """Guidance halves in the cache, and tokens of each; at the first scale those of what is drawn."""
    return (2, now.num_tokens) if now.index else conditioning.first(model)


def transform(
    conditioning: Conditioning,
    scales: Sequence[ScaleStep],
    index: int,
    model: ModelSpec,
    settings: SamplingSettings,
    batch: int,
) -> Run:
    """The transformer at a scale."""
    now = scales[index]
    halves, length = _first_or_both(conditioning, model, now)
    constants: dict[str, NDArray[Any]] = {}
    if not index:
        empty = np.zeros((0, halves * batch, model.embed_dim), np.float32)
        constants |= {PAST + name: empty for name in names_of(CACHED, model.depth)}
    if settings.exact:
        return run(TRANSFORMER, index, constants)
    branches = names_of(BRANCHES, model.depth) if model.prunable else []
    if model.prunable:
        constants["taking_part"] = np.arange(now.kept or length)
        constants["sources"] = np.zeros((SOURCES, length), np.int64)
        if now.kept:
            (side,) = (step.patch_num for step in scales if step.remembered)
            constants["sources"] = sources(side, now.patch_num)
        else:  # nothing is taken from it
            nothing = np.zeros((halves * batch, 1, model.embed_dim), np.float32)
            constants |= {MEMORY + name: nothing for name in branches}
    halved: set[str] = set()
    if not now.guided:
        halved = {"x", *(row.name for row in conditioning.moves[1])}
        if scales[index - 1].guided:  # from here on
            taken = {row.name for row in conditioning.takes if model.modulated or not row.modulated}
            halved |= {"head_condition", *taken}
    return replace(
        run(FAST, index, constants),
        also={MEMORY + name: BRANCH + name for name in branches} if now.remembered else {},
        halved=frozenset(halved),
    )


def leaves_tokens_out(run: Run) -> bool:
    """Whether a part of the tokens takes part in a run."""
    chosen, whole = (run.constants.get(name) for name in ("taking_part", "sources"))
    return chosen is not None and whole is not None and len(chosen) < whole.shape[1]


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
