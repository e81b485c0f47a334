"""The Frechet distance of two normal distributions (arXiv 1706.08500, equation 6), of whatever features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Normal:
    """A normal distribution of D features."""

    mean: Doubles
    """(D,)"""
    covariance: Doubles
    """(D, D)"""

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Normal:
        """That of features (N, D), two rows at least."""
        return cls(features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64))


def distance(one: Normal, other: Normal) -> float:
    """``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))``.

    The trace of the root of a product is that of ``(A^(1/2) B A^(1/2))^(1/2)``, which is symmetric: its
    eigenvalues are real, and those that rounding puts below zero stand for zero.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(0)).sum()
    gap = np.square(one.mean - other.mean).sum()
    return float(gap + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)
