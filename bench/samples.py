"""Repeated measurements and their percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity, in the order they were taken."""

    values: tuple[float, ...]
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(tuple(values), p50, p90, p99)
