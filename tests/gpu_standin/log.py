"""Reads what the stand-in's libraries wrote down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

WAITS = frozenset(["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"])


@dataclass(frozen=True)
class Call:
    """One call of CUDA's runtime."""

    name: str
    amount: int
    """Bytes, kernels of a graph, or a status."""
    rest: tuple[str, ...]
    """Address or handle; of copies the direction, and whether the host's side is pageable."""
    captured: bool
    picture: int | None
    """None before the first and after the last."""
    run: int | None
    """Number of the graph's run in this picture, None between runs."""


def read_log(file: Path) -> list[Call]:
    """Every call, in order."""
    return list(_calls(file.read_text(encoding="utf-8").splitlines()))


def _calls(lines: Iterable[str]) -> Iterator[Call]:
    picture: int | None = None
    run: int | None = None
    runs = 0
    for line in lines:
        words = line.split()
        match words:
            case ["#", "picture", number]:
                picture, runs = int(number), 0
            case ["#", "over"]:
                picture = None
            case ["#", "run", _]:
                run, runs = runs, runs + 1
            case ["#", "done"]:
                run = None
            case ["#", *_]:
                pass
            case ["ILLEGAL", *what]:
                yield Call("ILLEGAL", 0, tuple(what), False, picture, run)
            case _:
                captured = words[0] == "*"
                name, *rest = words[captured:]
                amount = int(rest[0]) if rest and rest[0].isdigit() else 0
                yield Call(name, amount, tuple(rest[1:]), captured, picture, run)


def copies(calls: Iterable[Call], direction: str) -> list[Call]:
    """Copies that ran: "H2D", "D2H", "D2D"."""
    return [c for c in calls if c.name.startswith("cudaMemcpy") and direction in c.rest and not c.captured]


def peak(calls: Iterable[Call], allocate: str = "cudaMalloc", free: str = "cudaFree") -> int:
    """Most bytes that were allocated at once."""
    sizes: dict[str, int] = {}
    now = most = 0
    for call in calls:
        if call.name == allocate and call.rest[1:] == ("0",):
            sizes[call.rest[0]] = call.amount
            now += call.amount
            most = max(most, now)
        elif call.name == free:
            now -= sizes.pop(call.rest[0], 0)
    return most


def alive(calls: Iterable[Call], made: str, destroyed: str) -> int:
    """Handles that nobody gave back."""
    handles: set[str] = set()
    for call in calls:
        if call.name == made:
            handles.add(call.rest[0])
        elif call.name == destroyed:
            handles.discard(call.rest[0])
    return len(handles)
