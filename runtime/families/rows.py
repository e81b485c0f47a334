"""What the rooms of a family have in common: a few shapes, and how a run and a contract are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hart_runtime.common.noise import Noise
from hart_runtime.runtime.contract import CACHE, CACHED, Contract, Dimension, Row
from hart_runtime.runtime.families.names import STAGES
from hart_runtime.runtime.program import Arrays, Run, none

BOTH = "2*batch"
"""Rows of both guidance halves."""
GUIDED = "guided"
"""Rows of those that codes are drawn from: both, or where guidance is left out the conditional alone."""
LATENTS = ("batch", "channels", "last", "last")
CODES = ("batch", "last", "last", "channels")

SCALE_KEYS = "scale{index}.block{block}.new_{kind}"
"""Where keys and values of a scale's tokens are recorded, both guidance halves or the first."""

NORM = 23
"""Opset of graphs with RMSNormalization, or with forms without attention and running sums in one piece."""


def contract(name: str, inputs: tuple[Row, ...], outputs: tuple[Row, ...], **more: Any) -> Contract:
    """Of a graph, whose name says to which stage it belongs."""
    return Contract(name, STAGES[name], inputs, outputs, **more)


def cache(prefix: str, *shape: Dimension, recorded: str = "kv.block{block}.{part}") -> Row:
    """Keys and values of every block."""
    return Row(prefix, shape, CACHE, recorded, blocks=CACHED)


def run(
    graph: str, index: int, constants: Arrays | None = None, random: Callable[[Noise], Arrays] = none
) -> Run:
    """Of a graph at a scale or a denoising step."""
    return Run(graph, STAGES[graph].format(index=index), index, constants or {}, random)
