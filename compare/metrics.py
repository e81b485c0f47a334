"""Numbers for "how far": error statistics of tensors, PSNR, SSIM and LPIPS of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Picture = NDArray[np.float32]

IDENTICAL_PSNR = 200.0
"""dB given to pictures without any difference, and the most any pair gets."""
SMALL = 1e-3
"""An element's relative error is taken against at least this share of the largest magnitude."""


@dataclass(frozen=True)
class Errors:
    """How far one output is from the reference's. Numbers are None where they mean nothing."""

    shape: tuple[int, ...]
    dtype: str
    finite: bool
    """Whether the engine's output holds no NaN, and infinity only where the reference has it."""
    error: float | None
    """The judged number: the largest error (beyond the call's slack) over the largest magnitude
    of the reference; for whole numbers, the share of elements that differ. None if the output
    is not finite, or has another shape."""
    reference_min: float | None = None
    reference_max: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    median_abs: float | None = None
    p99_abs: float | None = None
    max_rel: float | None = None
    mean_rel: float | None = None
    median_rel: float | None = None
    p99_rel: float | None = None
    cosine: float | None = None


def compare_tensors(reference: Array, found: Array, slack: Array | float = 0.0) -> Errors:
    """Error statistics of one output; one of another shape has no error but is wrong.

    Truncated logits (-inf) count as the smallest kept of their row, so that a near tie which
    falls on the other side of the cut is a small error and a wrong cut is a large one.
    """
    if reference.shape != found.shape:
        return Errors(found.shape, str(found.dtype), True, None)
    if not np.issubdtype(reference.dtype, np.floating):
        differ = float(np.mean(reference != found)) if reference.size else 0.0
        return Errors(found.shape, str(found.dtype), True, differ)
    expected, actual = _untruncated(reference), _untruncated(found)
    low, high = float(expected.min(initial=np.inf)), float(expected.max(initial=-np.inf))
    if not np.isfinite(actual).all():
        return Errors(found.shape, str(found.dtype), False, None, low, high)
    if not expected.size:
        return Errors(found.shape, str(found.dtype), True, 0.0)
    absolute = np.abs(actual - expected)
    largest = float(np.abs(expected).max())
    relative = absolute / np.maximum(np.abs(expected), max(SMALL * largest, np.finfo(np.float32).tiny))
    norms = float(np.linalg.norm(expected) * np.linalg.norm(actual))
    return Errors(
        shape=found.shape,
        dtype=str(found.dtype),
        finite=True,
        error=max(float((absolute - slack).max()), 0.0) / (largest or 1.0),
        reference_min=low,
        reference_max=high,
        **{f"{name}_abs": value for name, value in _statistics(absolute).items()},
        **{f"{name}_rel": value for name, value in _statistics(relative).items()},
        cosine=float(np.vdot(expected, actual)) / norms if norms else 1.0,
    )


def cosine(reference: Array, found: Array) -> float | None:
    """Of the angle between two tensors; None if one is not finite."""
    return compare_tensors(reference, found).cosine


def psnr(reference: Picture, found: Picture) -> float:
    """Decibels over pictures in [0, 1], at most ``IDENTICAL_PSNR``."""
    squared = float(np.mean(np.square(reference.astype(np.float64) - found)))
    return min(IDENTICAL_PSNR, -10 * float(np.log10(squared))) if squared else IDENTICAL_PSNR


def ssim(reference: Picture, found: Picture) -> float | None:
    """Mean structural similarity of two (3, H, W) pictures in [0, 1] (Wang et al., 2004).

    None for pictures smaller than its 11 x 11 window.
    """
    from skimage.metrics import structural_similarity

    if min(reference.shape[1:]) < 11:
        return None
    return float(
        structural_similarity(
            reference,
            found,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def lpips(reference: Picture, found: Picture) -> float | None:
    """Learned perceptual distance of two (3, H, W) pictures, None without the lpips package."""
    try:
        import lpips as package
        import torch
    except ModuleNotFoundError:
        return None
    network = package.LPIPS(net="alex", verbose=False)
    with torch.inference_mode():
        first, second = (torch.from_numpy(picture)[None] for picture in (reference, found))
        return float(network(first, second, normalize=True))


def _untruncated(values: Array) -> NDArray[np.float64]:
    """float64, with -inf replaced by the smallest finite number of its row."""
    wide = values.astype(np.float64)
    cut = np.isneginf(wide)
    if not cut.any():
        return wide
    smallest = np.where(cut, np.inf, wide).min(-1, keepdims=True)
    return np.where(cut, smallest, wide)


def _statistics(values: NDArray[np.float64]) -> dict[str, float]:
    return {
        "max": float(values.max()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p99": float(np.quantile(values, 0.99)),
    }
