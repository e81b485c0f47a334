"""What the played TensorRT writes into an engine file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

MAGIC = b"played TensorRT engine\n"
Profile = dict[str, tuple[tuple[int, ...], ...]]
"""Smallest, most important and largest shape (or values) by input."""


@dataclass(frozen=True)
class Tensor:
    """An input or output."""

    name: str
    dtype: str
    shape: list[int | str]
    """With names for what a profile leaves open."""
    is_input: bool


@dataclass(frozen=True)
class Plan:
    """An engine: for whom it was built, and the graph that it computes."""

    version: str
    system: str
    capabilities: list[str]
    gpu: str
    compatibility: str
    tf32: bool
    any_version: bool
    tensors: list[Tensor]
    on_host: list[str]
    profiles: list[Profile]
    values: list[Profile]
    scratch: list[int]
    """Bytes by profile."""
    weights: int
    """Bytes."""
    verbosity: str
    layers: list[dict[str, Any]]
    model: bytes

    def serialize(self) -> bytes:
        about = asdict(self)
        model = about.pop("model")
        head = json.dumps(about).encode()
        return MAGIC + len(head).to_bytes(8, "little") + head + model


def read_plan(content: bytes) -> Plan | None:
    """None if it is no plan, or a damaged one."""
    start = len(MAGIC) + 8
    try:
        if not content.startswith(MAGIC):
            return None
        end = start + int.from_bytes(content[len(MAGIC) : start], "little")
        about = json.loads(content[start:end])
        about["tensors"] = [Tensor(**tensor) for tensor in about["tensors"]]
        for kind in ("profiles", "values"):
            about[kind] = [{n: tuple(tuple(r) for r in rs) for n, rs in p.items()} for p in about[kind]]
        return Plan(**about, model=content[end:])
    except (ValueError, KeyError, TypeError):
        return None
