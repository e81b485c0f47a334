"""Models that draw a text: its tokens are what the first scale is made of (arXiv 2410.10812, section 3).

Tokens know their places by rotary angles, which begin behind the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hart_runtime.common.checkpoint import LLM
from hart_runtime.common.checkpoint import TEXT_ENCODER as TEXT_NETWORK
from hart_runtime.common.config import TextEncoderConfig, TransformerConfig, config_from_dict
from hart_runtime.common.schedule import ScaleStep, cell_axis
from hart_runtime.runtime.contract import BOOL, INT, NEW, OUT, PAST, Row
from hart_runtime.runtime.families.family import Conditioning
from hart_runtime.runtime.families.names import CONTEXT, TEXT_ENCODER, TOKEN_IDS, UNCONDITIONAL
from hart_runtime.runtime.families.operators import TEXT as OPERATORS
from hart_runtime.runtime.families.rows import BOTH, NORM, SCALE_KEYS, cache, contract, run
from hart_runtime.runtime.families.sizes import block_sizes, text_encoder_sizes
from hart_runtime.runtime.program import Arrays, Run
from hart_runtime.runtime.spec import ModelSpec

_TEXT = ("batch", "tokens")

_BEFORE = (
    contract(
        TEXT_ENCODER,
        (Row(TOKEN_IDS, _TEXT, INT, TOKEN_IDS), Row("mask", _TEXT, BOOL, "ctx.mask")),
        (Row("features", (*_TEXT, "context_dim"), recorded="ctx.features"),),
        opset=NORM,
        operations="batch * (2 * tokens * text_weights + 4 * tokens**2 * text_width)",
        bytes="text_weights * weight + batch * tokens * context_dim * (kept + 4)",
        scratch="batch * tokens * context_dim * (12 + 10 * unchanged)",
        scores="batch * text_heads * tokens**2 * unchanged",
        one_by_one=True,  # equal prompts are encoded once
        int8=True,
        exact_tokens=True,
        optional=True,
    ),
    contract(
        CONTEXT,
        (
            Row("features", (*_TEXT, "context_dim"), recorded="ctx.features"),
            Row("mask", _TEXT, BOOL, "ctx.mask"),
        ),
        (
            Row("x", (*_TEXT, "dim"), recorded="scale0.x_in"),
            Row("angles", (*_TEXT, "head"), recorded="scale0.angles"),
            Row("offset", (BOTH, 1), recorded="offset"),
            Row("head_condition", (BOTH, "dim"), recorded="head_condition"),
            Row("block_condition", ("batch", "dim"), recorded="block_condition", modulated=True),
        ),
        opset=NORM,
        operations="2 * batch * tokens * context_dim * dim + 8 * batch * dim**2",
        # The second product is the head norm's: its condition is the same at every scale.
        bytes="(context_dim * dim + 2 * dim**2) * weight"
        " + 4 * batch * tokens * (context_dim + dim) + 24 * batch * dim",
    ),
)
_AFTER = (
    # Puts the constant unconditional half beside what the transformer made of the text.
    contract(
        UNCONDITIONAL,
        (
            Row("hidden", (*_TEXT, "dim"), recorded="scale{index}.hidden"),
            Row("block_condition", ("batch", "dim"), recorded="block_condition", modulated=True),
            cache(NEW, "tokens", "batch", "dim", recorded=SCALE_KEYS),
        ),
        (
            Row(f"hidden{OUT}", (BOTH, "tokens", "dim"), recorded="scale{index}.hidden"),
            Row(f"block_condition{OUT}", (BOTH, "dim"), recorded="block_condition", modulated=True),
            cache(PAST, "tokens", BOTH, "dim", recorded=SCALE_KEYS),
        ),
    ),
)


def _begin(transformer: Run) -> Sequence[Run]:
    """The text runs in the conditional half alone: the other is a constant."""
    return (run(CONTEXT, 0), transformer, run(UNCONDITIONAL, 0))


def _places(scale: ScaleStep, model: ModelSpec) -> Arrays:
    return {"positions": cell_axis(scale.patch_num, model.reach)}


def _read(configurations: Mapping[str, Any]) -> TransformerConfig:
    return config_from_dict(TransformerConfig, configurations[LLM], "manifest")


def _describe(llm: TransformerConfig) -> dict[str, Any]:
    return {
        "context_token": llm.context_token,
        "context_dim": llm.context_dim,
        "modulated": llm.modulated,
    }


def _sizes(llm: TransformerConfig, configurations: Mapping[str, Any]) -> dict[str, int]:
    """Without a text encoder nothing of one."""
    found = block_sizes(llm) | {"modulation": 0 if llm.disable_aln else 6 * llm.embed_dim**2}
    if configurations.get(TEXT_NETWORK):
        text = config_from_dict(TextEncoderConfig, configurations[TEXT_NETWORK], "manifest")
        found |= text_encoder_sizes(text)
    return found


TEXT = Conditioning(
    before=_BEFORE,
    after=_AFTER,
    takes=(
        Row("angles", ("rows", "length", "head"), recorded="scale{index}.angles"),
        Row("block_condition", ("rows", "dim"), recorded="block_condition", modulated=True),
    ),
    moves=(
        (Row("positions", ("next_side",)), Row("offset", (BOTH, 1), recorded="offset")),
        (Row("angles", (BOTH, "next_side**2", "head"), recorded="scale{after}.angles"),),
    ),
    begin=_begin,
    first=lambda model: (1, model.context_token),
    places=_places,
    own=frozenset({"context_token", "context_dim"}),
    tables=lambda model: {},
    read=_read,
    describe=_describe,
    sizes=_sizes,
    operators=OPERATORS,
)
