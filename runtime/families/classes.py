"""Models that draw a class (VAR, arXiv 2404.02905, section 3.2): its embedding begins the first scale and
modulates every block.

Tokens know their places by embeddings, one for each of every scale. What a class makes of the blocks'
modulation is the same at every scale, so it is made once, before the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hart_runtime.common.checkpoint import LLM
from hart_runtime.common.config import ClassHartConfig, ClassTransformerConfig, config_from_dict
from hart_runtime.common.schedule import ScaleStep
from hart_runtime.runtime.contract import INT, Row
from hart_runtime.runtime.families.family import Conditioning
from hart_runtime.runtime.families.names import CONTEXT
from hart_runtime.runtime.families.operators import CLASS as OPERATORS
from hart_runtime.runtime.families.rows import BOTH, contract, run
from hart_runtime.runtime.families.sizes import block_sizes
from hart_runtime.runtime.program import Arrays, Run
from hart_runtime.runtime.spec import ModelSpec

LABEL, PLACES = "label", "places"
"""What a drawing is given, the class of each picture, and numbers of tokens among those of all scales."""

_BEFORE = (
    contract(
        CONTEXT,
        (Row(LABEL, ("batch",), INT, LABEL),),
        (
            Row("x", (BOTH, "first", "dim"), recorded="scale0.x_in"),
            Row("head_condition", (BOTH, "dim"), recorded="cond"),
            Row("modulations", (BOTH, "depth", 6, "dim"), recorded="modulations"),
        ),
        operations="4 * batch * (modulations + 2 * dim**2)",  # the second is the head norm's
        bytes="(modulations + 2 * dim**2) * weight + 8 * batch * dim * (2 + first + 6 * depth)",
        scratch="64 * batch * depth * dim",
    ),
)


def _begin(transformer: Run) -> Sequence[Run]:
    return (run(CONTEXT, 0), transformer)


def _places(scale: ScaleStep, model: ModelSpec) -> Arrays:
    """Numbers of a scale's tokens among those of all scales, (n, n)."""
    side = scale.patch_num
    begin = sum(n * n for n in model.patch_nums[: scale.index])
    return {PLACES: np.arange(begin, begin + side * side, dtype=np.int64).reshape(side, side)}


def _read(configurations: Mapping[str, Any]) -> ClassTransformerConfig:
    values = configurations[LLM]
    if "diff_width" in values:
        return config_from_dict(ClassHartConfig, values, "manifest")
    return config_from_dict(ClassTransformerConfig, values, "manifest")


def _sizes(llm: ClassTransformerConfig, configurations: Mapping[str, Any]) -> dict[str, int]:
    own = 6 * llm.embed_dim**2
    return block_sizes(llm) | {"modulation": 0, "modulations": own * (1 if llm.shared_aln else llm.depth)}


CLASS = Conditioning(
    before=_BEFORE,
    after=(),
    takes=(Row("modulations", ("rows", "depth", 6, "dim"), recorded="modulations"),),
    moves=((Row(PLACES, ("next_side", "next_side"), INT),), ()),
    begin=_begin,
    first=lambda model: (2, model.patch_nums[0] ** 2),
    places=_places,
    own=frozenset({"num_classes"}),
    tables=lambda model: {LABEL: model.num_classes + 1, PLACES: sum(n * n for n in model.patch_nums)},
    read=_read,
    describe=lambda llm: {"num_classes": llm.num_classes},
    sizes=_sizes,
    operators=OPERATORS,
)
