"""What differs between model families, in one record, and how it is put together.

A family is a combination of what is drawn (:class:`Conditioning`: a text, a class) and of what pictures
are made of (:class:`Tokens`: codes alone, or codes and a continuous residual). The scales between them
(:mod:`hart_runtime.runtime.families.scales`) are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hart_runtime.common.schedule import ScaleStep
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.contract import Contract, Contracts, Row
from hart_runtime.runtime.families.operators import Operators
from hart_runtime.runtime.program import Arrays, Run, Step
from hart_runtime.runtime.shapes import Dims
from hart_runtime.runtime.spec import ModelSpec


@dataclass(frozen=True)
class Conditioning:
    """What is drawn, and how its transformer knows where a token belongs."""

    before: tuple[Contract, ...]
    """Graphs that make the transformer's first input."""
    after: tuple[Contract, ...]
    """Graphs between the transformer and the first draw."""
    takes: tuple[Row, ...]
    """What the transformer takes beside new tokens and its cache."""
    moves: tuple[tuple[Row, ...], tuple[Row, ...]]
    """What ``next_scale`` takes and returns for the places of the next tokens."""
    begin: Callable[[Run], Sequence[Run]]
    """Of the transformer's run at the first scale: runs until the first hidden states of both halves."""
    first: Callable[[ModelSpec], tuple[int, int]]
    """Of a model: guidance halves that the transformer runs at scale 0, and tokens of each."""
    places: Callable[[ScaleStep, ModelSpec], Arrays]
    """What the host feeds ``next_scale`` for the places of a scale's tokens."""
    own: frozenset[str]
    """Sizes of a model that others have not."""
    tables: Callable[[ModelSpec], dict[str, int]]
    """Rows of the tables that numbers are looked up in, by the input that brings them; without a text's,
    which only its tokenizer knows."""
    read: Callable[[Mapping[str, Any]], Any]
    """The transformer's configuration, of all that a manifest holds."""
    describe: Callable[[Any], dict[str, Any]]
    """Own sizes, from the transformer's configuration."""
    sizes: Callable[[Any, Mapping[str, Any]], dict[str, int]]
    """Of the transformer's configuration and all of them: what formulas are made of besides."""
    operators: Mapping[str, Operators]


@dataclass(frozen=True)
class Tokens:
    """What pictures are made of."""

    hybrid: bool
    """Whether a continuous residual follows the last codes."""
    graphs: tuple[Contract, ...]
    """From the last codes to the latent."""
    end: Callable[[ModelSpec, SamplingSettings, int, Sequence[ScaleStep]], tuple[list[Step], Run, Run]]
    """Of a model, settings, a number of pictures and their scales: steps after the last scale, the run that
    makes the latent, and the one that makes it of what there is before these steps."""
    edited: tuple[str, ...]
    """What the latent's graph takes that is made anew where given pictures are kept."""
    own: frozenset[str]
    describe: Callable[[Any], dict[str, Any]]
    sizes: Callable[[Any, int], dict[str, int]]
    """Of the transformer's configuration and the channels of a latent."""
    lacks: Mapping[str, str]
    """Settings that have no effect, and why."""
    operators: Mapping[str, Operators]


@dataclass(frozen=True)
class Family:
    """A kind of model: its graphs, and the steps of a drawing."""

    name: str
    graphs: Contracts
    """In the order in which a picture needs them."""
    dims: Callable[[ModelSpec, SamplingSettings, int], list[Dims]]
    """Of a model, settings and a number of pictures: the free dimensions at each scale."""
    steps: Callable[[ModelSpec, SamplingSettings, int, bool], tuple[Step, ...]]
    """Of a model, settings, a number of pictures and whether parts of given ones are kept: what a drawing
    does, and feeds by name. The first step finds what the caller gave, the last leaves the latent that
    ``decode`` takes."""
    sizes: Callable[[ModelSpec, Mapping[str, Any]], dict[str, int]]
    """Of a model and its configurations: what formulas of operations and bytes are made of besides."""
    describe: Callable[[Any, Any, tuple[int, ...]], ModelSpec]
    """Of the configurations of transformer and image tokenizer, and the sides of the scales."""
    tables: Callable[[ModelSpec], dict[str, int]]
    """As of :class:`Conditioning`."""
    decode: Run
    """Makes pixels of a latent."""
    own: frozenset[str]
    """Sizes of a model that not every family has."""
    sampling: SamplingSettings
    """The published sampler's."""
    draws: str = stages.SCALE
    """What a step is called after which there is more of a picture: one of
    :data:`hart_runtime.runtime.stages.DRAWS`."""
    presets: Mapping[str, SamplingSettings] = field(default_factory=dict)
    """Other settings that have a name."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Settings that have no effect, and why."""
