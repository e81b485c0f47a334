"""What changed between two results, beyond the noise of their samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hart_runtime.bench.machine import Company
from hart_runtime.common.errors import listed, shown

AGREEMENT = 0.95
"""Share of all pairs of samples, one of each result, that have to agree on which is larger."""
LEAST_CHANGE = 0.01
"""Smaller changes of the median are not worth a line."""
LEAST_SAMPLES = 4

CONDITIONS = {
    "bundle": ("bundle", "identity"),
    "precision": ("bundle", "precision"),
    "picture size": ("bundle", "image_size"),
    "start": ("bundle", "starts_at"),
    "batch of the stages": ("breakdown", "batch"),
    "sampling": ("bundle", "sampling"),
    "device": ("device",),
    "backend": ("backend",),
    "threads": ("threads",),
    "CPU": ("machine", "cpu"),
    "cores": ("machine", "cores"),
    "GPU": ("machine", "gpu"),
    "Jetson": ("machine", "jetson"),
    "libraries": ("machine", "libraries"),
    "Python": ("machine", "python"),
    "system": ("machine", "system"),
}


@dataclass(frozen=True)
class Change:
    """One quantity in both results."""

    name: str
    unit: str
    before: float
    """Medians."""
    after: float
    noise: bool
    """The samples do not tell the two apart."""
    few: bool
    """There are too few samples to tell."""

    @property
    def relative(self) -> float:
        return self.after / self.before - 1 if self.before else 0.0


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """All quantities that both results hold, in the order of the first."""
    old, new = _quantities(before), _quantities(after)
    return [
        Change(
            name,
            _unit(name),
            float(np.median(samples)),
            float(np.median(new[name])),
            noise=not is_change(samples, new[name]),
            few=min(len(samples), len(new[name])) < LEAST_SAMPLES,
        )
        for name, samples in old.items()
        if name in new
    ]


def is_change(before: list[float], after: list[float]) -> bool:
    """Whether one side is larger in nearly every pair of samples, and by more than a trifle."""
    if min(len(before), len(after)) < LEAST_SAMPLES:
        return False
    a, b = np.array(before)[:, None], np.array(after)
    larger = float((b > a).mean() + (b == a).mean() / 2)
    middle = float(np.median(before))
    moved = abs(float(np.median(after)) - middle) > LEAST_CHANGE * abs(middle)
    return moved and max(larger, 1 - larger) >= AGREEMENT


def different_conditions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Sentences on what makes two results hard to compare."""
    found = []
    for name, path in CONDITIONS.items():
        old, new = _at(before, path), _at(after, path)
        if old != new:
            found.append(f"{name}: {shown(_short(old, new))} -> {shown(_short(new, old))}")
    quantities = (_quantities(before), _quantities(after))
    for label, own, other in (("first", *quantities), ("second", *reversed(quantities))):
        if alone := [name for name in own if name not in other]:
            found.append(f"only in the {label}: {listed(alone)}")
    for label, values in (("first", before), ("second", after)):
        if warning := Company(**values["company"]).warning():
            found.append(f"{label} run: {warning}")
    return found


def _quantities(values: dict[str, Any]) -> dict[str, list[float]]:
    """Samples by name; seconds unless the name says bytes, rate or ratio."""
    found: dict[str, list[float]] = {}
    for row in values["latency"]:
        found[f"batch {row['batch']}"] = row["seconds"]["values"]
    first = values["first_pictures"]
    for name in first[0]:
        if all(picture[name] is not None for picture in first):
            found[f"first picture: {name}"] = [float(picture[name]) for picture in first]
    for row in values["against"]:
        found[f"{row['name']}: ratio"] = row["ratio"]["values"]
    breakdown = values["breakdown"]
    for stage in breakdown["stages"]:
        found[stage["name"]] = stage["seconds"]["values"]
        found[f"{stage['name']}, host"] = stage["host"]["values"]
    for graph, samples in breakdown["graphs"].items():
        found[f"graph {graph}"] = samples["values"]
    return {name: samples for name, samples in found.items() if any(samples)}


def _unit(name: str) -> str:
    if name.endswith("bytes"):
        return "bytes"
    return "ratio" if name.endswith("ratio") else "seconds"


def _at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = values
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _short(value: Any, other: Any) -> Any:
    """Of two dictionaries, only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: entry for key, entry in value.items() if other.get(key) != entry}
    return value
