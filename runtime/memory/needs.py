"""What an actor needs of a node, asked for before any starts: Ray waits for ever for what is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hart_runtime.common.errors import InputError
from hart_runtime.runtime.backends.names import AUTO, CPU, CUDA
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.memory.forecast import PROCESS, needed

SHARE = 0.8
"""CPUs of an actor on the CPU, unless somebody says how many: tasks of Ray's own need what is left of a node,
or all wait for ever."""


@dataclass(frozen=True)
class Needs:
    """What an actor asks Ray for."""

    cpus: float
    gpus: int
    memory: int
    """Bytes on the host."""

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}

    def fit(self, node: Mapping[str, float]) -> int:
        """How many actors a node has room for."""
        return min(int(node.get(name, 0) / value + 1e-9) for name, value in self.resources.items() if value)

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU, " if self.gpus else ""
        return f"{gpu}{self.cpus:g} CPU and {self.memory / 1e9:.2f} GB of memory"


def needs_of(
    manifest: Manifest,
    batch: int,
    device: str,
    cpus: float | None,
    text: bool = True,
    drawing: bool = True,
) -> Needs:
    """What drawing a batch needs, of the numbers that a dry run of an export tells.

    Args:
        device: "cuda" takes a GPU for itself, "cpu" none.
        cpus: as many as it is asked for; what is usual if None.
        text: whether the text encoder is held; it stays open.
        drawing: whether everything else is.
    """
    found = needed(manifest, batch)
    stored = found.weights * drawing + found.text * text
    if device == CUDA:
        return Needs(cpus or 1, 1, PROCESS + found.staged * drawing + stored)
    between = (found.arena + found.constants) * drawing
    return Needs(cpus or SHARE, 0, PROCESS + stored + between + found.scratch)


def device_for(device: str, manifest: Manifest, nodes: Iterable[Mapping[str, float]]) -> str:
    """Where actors draw: "auto" is a GPU where there is one and the bundle runs there."""
    if device != AUTO:
        return device
    return CUDA if manifest.kind.engines and any(node.get("GPU", 0) for node in nodes) else CPU


def actors_for(
    asked: tuple[int, int] | None,
    needs: Needs,
    nodes: Iterable[Mapping[str, float]],
    name: str = "actors",
) -> tuple[int, int]:
    """How many actors there are, at the least and at the most; as many as fit if nobody asks.

    Raises:
        InputError: so many will never fit, and Ray would wait for ever.
    """
    nodes = list(nodes)
    room = sum(map(needs.fit, nodes))
    least, most = asked or (room, room)
    if room < max(least, 1):
        have = "; ".join(
            ", ".join(f"{name} {node.get(name, 0):g}" for name in needs.resources) for node in nodes
        )
        raise InputError(
            f"`{name}`: {max(least, 1)} need {needs} each, and there is room for {room} (nodes: {have}); "
            f"ask for fewer, or for fewer `cpus` each"
        )
    return least, most


def without(nodes: Iterable[Mapping[str, float]], needs: Needs, count: int) -> list[dict[str, float]]:
    """What nodes have left beside some actors, which go where most of them fit."""
    left = [dict(node) for node in nodes]
    for _ in range(count):
        node = max(left, key=needs.fit)
        node |= {name: node.get(name, 0) - value for name, value in needs.resources.items()}
    return left
