"""What an engine says of itself once it is loaded: its scratch, and how it computes attention."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from hart_runtime.runtime.tensorrt.package import Package

FUSED, IN_PART, NOT_FUSED, UNKNOWN = "fused", "fused in part", "not fused", "unknown"
FUSED_KERNEL = re.compile(r"_mha|fmha|flash_?att", re.IGNORECASE)
"""In names of layers and tactics: ``_gemm_mha_v2_myl0_12``, ``_gemv_mha_v1``, ``fmha_v2_flash_...``."""
SOFTMAX_KERNEL = re.compile(r"softmax|exp(cast?)?sum", re.IGNORECASE)
"""A softmax by itself, between two products: a layer of that type, or a generated kernel whose name lists
what it does, such as ``__myl_MulMaxSubExpSum_myl1_3``."""


@dataclass(frozen=True)
class Inspection:
    """What was found in one engine."""

    scratch: tuple[int, ...]
    """Bytes that each profile needs while it runs."""
    attention: str
    """One of the words above."""


def inspect_engine(package: Package, serialized: bytes, logger: Any) -> Inspection | None:
    """Load an engine, on the GPU that it was built for, and look at it; None where it cannot be loaded."""
    trt = package.api
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        return None
    sizes = [engine.get_device_memory_size_for_profile_v2(i) for i in range(engine.num_optimization_profiles)]
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, engine  # in this order, and both before the runtime
    return Inspection(tuple(int(size) for size in sizes), attention_of(text))


def attention_of(information: str) -> str:
    """Whether attention runs in fused kernels, by an engine's layers.

    A fused kernel never writes the scores of all pairs of tokens to memory. The layers are those of all
    profiles together: since version 10 the package does not tell them apart.

    Args:
        information: of a whole engine, JSON as its inspector gives it.
    """
    try:
        values = json.loads(information)
    except ValueError:
        return UNKNOWN
    layers = values.get("Layers") if isinstance(values, dict) else None
    names = [_named(layer) for layer in layers] if isinstance(layers, list) else []
    fused = sum(bool(FUSED_KERNEL.search(name)) for name in names)
    apart = sum(bool(SOFTMAX_KERNEL.search(name)) and not FUSED_KERNEL.search(name) for name in names)
    if fused:
        return IN_PART if apart else FUSED
    return NOT_FUSED if apart else UNKNOWN


def _named(layer: object) -> str:
    """Its name, type and kernel; without details a layer is its name alone."""
    if isinstance(layer, dict):
        return " ".join(str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    return str(layer)
