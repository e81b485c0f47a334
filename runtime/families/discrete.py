"""Tokens that are codes alone, as VAR's: the last scale is smoothed like all others, and nothing follows."""

from __future__ import annotations

from collections.abc import Sequence

from hart_runtime.common.schedule import ScaleStep
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import OUT, Row
from hart_runtime.runtime.families.family import Tokens
from hart_runtime.runtime.families.names import LATENT
from hart_runtime.runtime.families.operators import DISCRETE as OPERATORS
from hart_runtime.runtime.families.rows import CODES, LATENTS, contract, run
from hart_runtime.runtime.program import Run, Step
from hart_runtime.runtime.spec import ModelSpec

NO_RESIDUAL = "this model has no residual, its image tokenizer is discrete"

_GRAPHS = (
    contract(
        LATENT,
        (Row("f_hat", LATENTS, recorded="scale{before}.f_hat"), Row("h", CODES)),
        (Row(f"f_hat{OUT}", LATENTS, recorded="final.f_hat"),),
        operations="2 * batch * cells * channels * phi",
        bytes="8 * batch * cells * channels",
    ),
)


def _end(
    model: ModelSpec, settings: SamplingSettings, batch: int, scales: Sequence[ScaleStep]
) -> tuple[list[Step], Run, Run]:
    whole = run(LATENT, scales[-1].index)
    return [], whole, whole


DISCRETE = Tokens(
    hybrid=False,
    graphs=_GRAPHS,
    end=_end,
    edited=("h",),
    own=frozenset(),
    describe=lambda llm: {},
    sizes=lambda llm, channels: {},
    lacks={"residual": NO_RESIDUAL, "steps": NO_RESIDUAL},
    operators=OPERATORS,
)
