"""Engines of fp8 bundles: which GPUs they are for, and a sentence for the others."""

from __future__ import annotations

from dataclasses import replace

from hart_runtime.common.errors import InputError, listed, parameter
from hart_runtime.common.precisions import FLOAT8_CAPABILITY, FP8, FP16
from hart_runtime.runtime.backends.names import CUDA
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.memory.gpu import Gpu, present_gpu
from hart_runtime.runtime.tensorrt.builder import BuildOptions

USUAL = (FLOAT8_CAPABILITY, "12.0")
"""What is built for where nobody says for what, and no GPU is here."""


def for_float8(
    manifest: Manifest, ahead_of_time: bool, options: BuildOptions, gpu: Gpu | None
) -> BuildOptions:
    """Options for engines of a bundle, with GPUs that run them where the package's own choice has others.

    Raises:
        InputError: it is an fp8 bundle, and for a GPU that has no such products.
    """
    if manifest.precision != FP8:
        return options
    asked = options.compute_capabilities
    if old := [capability for capability in asked if is_older(capability)]:
        raise InputError(f"`compute_capabilities`: {_needed(manifest)}, found {listed(old)}")
    if not asked and (reason := lacking(manifest, gpu)):
        raise InputError(reason)
    if asked or gpu is not None or not ahead_of_time:
        return options
    return replace(options, compute_capabilities=USUAL)


def require_float8(manifest: Manifest, index: int) -> None:
    """Raises InputError where a GPU has no products that an fp8 bundle wants."""
    if manifest.precision == FP8 and (reason := lacking(manifest, present_gpu(index))):
        raise InputError(f"{parameter('device', CUDA)}: {reason}")


def lacking(manifest: Manifest, gpu: Gpu | None) -> str | None:
    """Why a GPU runs no engines of a bundle, if it is there and that is so."""
    if manifest.precision != FP8 or gpu is None or not is_older(gpu.capability):
        return None
    return f"{_needed(manifest)}, {gpu} has {gpu.capability}"


def is_older(capability: str) -> bool:
    """Whether a compute capability is older than the first that has such products."""
    return float(capability) < float(FLOAT8_CAPABILITY)


def _needed(manifest: Manifest) -> str:
    return (
        f"{manifest.name} is an {FP8} bundle, for which a GPU needs compute capability {FLOAT8_CAPABILITY} "
        f"or newer (for another export the checkpoint with {parameter('precision', FP16)})"
    )
