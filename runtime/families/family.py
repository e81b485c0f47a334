"""What differs between model families, in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import Contracts
from hart_runtime.runtime.program import Run, Step
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """A kind of model: its graphs, and the steps of a drawing."""

    name: str
    graphs: Contracts
    dims: Callable[[ModelSpec, int], list[Dims]]
    """Of a model and a number of pictures: the free dimensions at each scale."""
    steps: Callable[[ModelSpec, SamplingSettings, int], tuple[Step, ...]]
    """Of a model, settings and a number of pictures: what a drawing does, and feeds by name. The first
    step finds what the caller gave, the last leaves the latent that ``decode`` takes."""
    sizes: Callable[[ModelSpec, Mapping[str, Any]], dict[str, int]]
    """Of a model and its configurations: what formulas of operations and bytes are made of besides."""
    decode: Run
    """Makes pixels of a latent."""
