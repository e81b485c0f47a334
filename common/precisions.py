"""The precisions a bundle can have: the type of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """One of them, and what follows from it."""

    name: str
    weight_bytes: int
    """Of a weight of a matrix product."""
    block_bytes: int
    """Of one in the transformer's blocks."""
    traced: str
    """Type that the graphs are traced in: a name of numpy and torch."""
    kept: str
    """Type of what is only looked up or waits: tables of a text's tokens, keys and values."""
    engines: bool
    """Whether GPUs run it; without, it is for CPUs alone."""

    @property
    def traced_bytes(self) -> int:
        """Of a weight that stays as it was traced."""
        return _BYTES[self.traced]

    @property
    def kept_bytes(self) -> int:
        """Of a cached key, and of an element of a text's table."""
        return _BYTES[self.kept]


_BYTES = {"float32": 4, "float16": 2}
FP32, FP16, INT8, FP8 = "fp32", "fp16", "int8", "fp8"
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(FP32, 4, 4, "float32", "float32", engines=True),
        Precision(FP16, 2, 2, "float16", "float16", engines=True),
        # Large products run in 8-bit integers, which replace those of float32 after tracing.
        Precision(INT8, 1, 1, "float32", "float16", engines=False),
        # Products of the blocks run in 8-bit floating point, which replaces half after tracing.
        Precision(FP8, 2, 1, "float16", "float16", engines=True),
    )
}
DEFAULT_PRECISION = FP16
FLOAT8_CAPABILITY = "8.9"
"""The first compute capability of GPUs that multiply numbers of 8-bit floating point."""
