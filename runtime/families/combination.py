"""Puts a family together of what is drawn and what pictures are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hart_runtime.common.checkpoint import TOKENIZER
from hart_runtime.common.config import TokenizerConfig, config_from_dict
from hart_runtime.common.schedule import scale_steps
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.families.family import Conditioning, Family, Tokens
from hart_runtime.runtime.families.operators import COMMON, operators_of
from hart_runtime.runtime.families.scales import (
    DECODE,
    DECODING,
    ENCODING,
    codes,
    drawing_graphs,
    fast_graph,
    next_scale,
    scale_dims,
    transform,
    transformer_graph,
)
from hart_runtime.runtime.families.sizes import tokenizer_sizes
from hart_runtime.runtime.program import Run, Step
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec

OF_MASKED = ("iterations", "guidance_schedule", "temperature")
NOT_MASKED = "this model draws whole scales, and no masked tokens"


def combined(
    name: str,
    conditioning: Conditioning,
    tokens: Tokens,
    sampling: SamplingSettings,
    presets: Mapping[str, SamplingSettings] | None = None,
) -> Family:
    """A family.

    Args:
        sampling: settings of its published sampler.
        presets: others that have a name.
    """
    contracts = (
        *conditioning.before,
        transformer_graph(conditioning),
        fast_graph(conditioning),
        *conditioning.after,
        *drawing_graphs(conditioning),
        *tokens.graphs,
        DECODING,
        ENCODING,
    )
    operators = {**COMMON, **conditioning.operators, **tokens.operators}

    def latent_edited(run: Run) -> Run:
        return replace(run, edited=tuple(name for name in tokens.edited if name not in run.constants))

    def dims(model: ModelSpec, settings: SamplingSettings, batch: int) -> list[Dims]:
        scales = scale_steps(model.patch_nums, settings, model.vocab_size, tokens.hybrid)
        return scale_dims(conditioning, model, scales, batch)

    def steps(model: ModelSpec, settings: SamplingSettings, batch: int, edited: bool) -> tuple[Step, ...]:
        """Every scale, what follows the last, and the latent that is decoded at the end."""
        scales = scale_steps(model.patch_nums, settings, model.vocab_size, tokens.hybrid)
        more, whole, without = tokens.end(model, settings, batch, scales)
        if edited:
            more = [replace(step, preview=tuple(map(latent_edited, step.preview))) for step in more]
            whole, without = latent_edited(whole), latent_edited(without)
        found = []
        for now in scales:
            transformer = transform(conditioning, scales, now.index, model, settings, batch)
            hidden = [transformer] if now.index else conditioning.begin(transformer)
            runs = (*hidden, *codes(now, model, settings))
            last = now is scales[-1]
            if not last:
                following = next_scale(now, scales[now.index + 1], conditioning, model, batch)
                runs = (*runs, replace(following, edited=("h",)) if edited else following)
            found.append(Step(stages.SCALE, now.index, len(scales), runs, (without,) if last else ()))
        return (*found, *more, Step(stages.DECODER, 0, 1, (whole,), ()))

    def sizes(model: ModelSpec, configurations: Mapping[str, Any]) -> dict[str, int]:
        llm = conditioning.read(configurations)
        image = config_from_dict(TokenizerConfig, configurations[TOKENIZER], "manifest")
        return {
            **conditioning.sizes(llm, configurations),
            **tokens.sizes(llm, image.z_channels),
            **tokenizer_sizes(image, model.patch_nums[-1]),
        }

    def describe(llm: Any, image: TokenizerConfig, patch_nums: tuple[int, ...]) -> ModelSpec:
        return ModelSpec(
            patch_nums=patch_nums,
            depth=llm.depth,
            embed_dim=llm.embed_dim,
            num_heads=llm.num_heads,
            vocab_size=image.vocab_size,
            latent_channels=image.z_channels,
            image_size=patch_nums[-1] * image.downsample,
            **conditioning.describe(llm),
            **tokens.describe(llm),
        )

    return Family(
        name=name,
        graphs={
            graph.name: replace(
                graph, operators=operators_of(operators[graph.name], graph.int8, graph.exact_tokens)
            )
            for graph in contracts
        },
        dims=dims,
        steps=steps,
        sizes=sizes,
        describe=describe,
        tables=conditioning.tables,
        decode=DECODE,
        own=conditioning.own | tokens.own | {"vocab_size"},
        sampling=sampling,
        presets=presets or {},
        lacks={**tokens.lacks, **dict.fromkeys(OF_MASKED, NOT_MASKED)},
    )
