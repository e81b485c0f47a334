"""What the server and its workers tell each other, over a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.pictures import Source


@dataclass(frozen=True)
class Encoding:
    """How a picture becomes bytes."""

    format: str = "png"
    """png, jpeg or webp; a PNG is the one that hart-run writes."""
    quality: int = 85
    """Of JPEG and WebP."""


@dataclass(frozen=True)
class Job:
    """One picture."""

    prompt: str
    seed: int
    final: Encoding
    partial: Encoding
    source: Source | None = None
    """A given picture that it goes on from; all jobs of a batch have one, or none has."""


@dataclass(frozen=True)
class Draw:
    """Pictures that are drawn as one batch."""

    number: int
    """Of the batch."""
    model: str
    size: int
    """Pixels along a side."""
    jobs: tuple[Job, ...]
    settings: SamplingSettings
    scales: frozenset[int]
    """After which the pictures are shown as they stand."""


@dataclass(frozen=True)
class Leave:
    """Nobody waits any more for a picture of a batch."""

    number: int
    row: int


@dataclass(frozen=True)
class Ready:
    """A worker has opened the bundles it begins with, and drawn with them; or a screener its model."""


@dataclass(frozen=True)
class Shown:
    """A picture as it stands after a scale."""

    number: int
    row: int
    scale: int
    data: str
    """base64."""


@dataclass(frozen=True)
class Finished:
    """A picture."""

    number: int
    row: int
    data: str
    """base64."""
    tokens: int
    """Of its prompt."""
    read: str | None = None
    """What of the prompt was drawn, where that is not all of it."""


@dataclass(frozen=True)
class Drawn:
    """A batch is over, and the worker free for another; its pictures may still be on their way."""

    number: int
    stopped: bool = False
    """Because nobody waited for it any more."""
    seconds: Mapping[str, float] | None = None
    """By stage."""
    encoded: int = 0
    """Prompts that were not known from before."""


@dataclass(frozen=True)
class Screened:
    """What the safety model says of a prompt."""

    blocked: bool
    seconds: float


@dataclass(frozen=True)
class Failed:
    """Nothing was drawn."""

    number: int | None
    """Of the batch; None where it was nobody's request: the worker could not begin."""
    message: str
    bad_input: bool = False
    """Whether the request was at fault."""


Order = Draw | Leave | str
"""A text is a prompt to be screened."""
Report = Ready | Shown | Finished | Drawn | Screened | Failed
