"""MAR: a class, and continuous tokens that are drawn in an order of each picture's own (arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hart_runtime.common.checkpoint import LLM, TOKENIZER
from hart_runtime.common.config import config_from_dict
from hart_runtime.common.diffusion_schedule import TRAIN_STEPS
from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.common.settings import MAR_FAST, MAR_PUBLISHED
from hart_runtime.runtime import stages
from hart_runtime.runtime.families.family import Family
from hart_runtime.runtime.families.masked import GRAPHS, LABEL, dims, steps
from hart_runtime.runtime.families.operators import MASKED, operators_of
from hart_runtime.runtime.families.scales import DECODE, DECODING
from hart_runtime.runtime.families.sizes import diffusion_weights, kl_decoder_counts
from hart_runtime.runtime.spec import ModelSpec

NAME = "mar"
_NO_CODES = "this model draws continuous tokens, and there are no codes to choose from"
_NO_SCALES = "this model has no scales, of which the last could do with less"
LACKS = {
    "top_k": _NO_CODES,
    "top_p": _NO_CODES,
    "smooth": _NO_CODES,
    "residual": "this model's tokens are continuous, and there is no residual behind them",
    "prune": _NO_SCALES,
    "keep": _NO_SCALES,
    "unguided_scales": _NO_SCALES,
}


def _describe(config: MarConfig, image: KlConfig, patch_nums: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(
        patch_nums=patch_nums,
        depth=config.encoder_depth,
        embed_dim=config.encoder_dim,
        num_heads=config.encoder_heads,
        vocab_size=0,
        latent_channels=config.latent_channels,
        image_size=config.latent_side * image.downsample,
        diff_width=config.diff_width,
        num_classes=config.num_classes,
        patch=config.patch,
        buffer=config.buffer,
        decoder_dim=config.decoder_dim,
    )


def _sizes(model: ModelSpec, configurations: Mapping[str, Any]) -> dict[str, int]:
    config = config_from_dict(MarConfig, configurations[LLM], "manifest")
    image = config_from_dict(KlConfig, configurations[TOKENIZER], "manifest")
    operations, weights = kl_decoder_counts(image, model.patch_nums[-1])
    encoder, decoder = config.encoder_dim, config.decoder_dim
    return {
        "encoder_depth": config.encoder_depth,
        "decoder_depth": config.decoder_depth,
        "heads": max(config.encoder_heads, config.decoder_heads),
        "encoder_weights": config.encoder_depth * (4 * encoder**2 + 2 * encoder * config.encoder_hidden)
        + encoder * config.token_channels,
        "filling_weights": config.decoder_depth * (4 * decoder**2 + 2 * decoder * config.decoder_hidden)
        + encoder * decoder,
        "residual_weights": diffusion_weights(config.diff_width, config.diff_depth, config.token_channels),
        "decoder_operations": operations,
        "decoder_weights": weights,
        "decoder_width": image.ch * image.ch_mult[0],
    }


MAR = Family(
    name=NAME,
    graphs={
        graph.name: replace(graph, operators=operators_of(MASKED[graph.name], graph.int8))
        for graph in (*GRAPHS, DECODING)
    },
    dims=dims,
    steps=steps,
    sizes=_sizes,
    describe=_describe,
    tables=lambda model: {LABEL: model.num_classes + 1, "timesteps": TRAIN_STEPS},
    decode=DECODE,
    own=frozenset({"num_classes", "diff_width", "patch", "buffer", "decoder_dim"}),
    sampling=MAR_PUBLISHED,
    draws=stages.ITERATION,
    presets={"fid": MAR_PUBLISHED, "fast": MAR_FAST},
    lacks=LACKS,
)
