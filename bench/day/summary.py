"""``summary.md``: what passed, at what ratio, and what takes the time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hart_runtime.bench.day.part import PASSED, Outcome
from hart_runtime.bench.result import RESULT_FILE
from hart_runtime.bench.timing import HOST

RULES_FILE = "rules.json"
HARD = 0.5
"""Share of the measured peak from which on a stage is bound by it."""


def write_summary(folder: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Path:
    """Write it into the day's folder, from the results that the parts left there."""
    gpu = machine["gpu"]
    lines = [
        f"# {gpu['name']}",
        "",
        f"Compute capability {gpu['capability']}, {gpu['memory'] / 1e9:.1f} GB, driver for CUDA "
        f"{machine['driver']}, Python {machine['python']}. {_libraries(machine)}.",
        "",
        f"{sum(o.verdict == PASSED for o in outcomes)} of {len(outcomes)} parts passed.",
        "",
        "| part | | seconds | |",
        "|---|---|---:|---|",
        *(f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {_cell(o.said)} |" for o in outcomes),
        *_section("Speed", list(_speed(folder))),
        *_section("Rules of CUDA that it does not keep to the letter", list(_rules(folder))),
    ]
    file = folder / "summary.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _libraries(machine: Mapping[str, Any]) -> str:
    ours = ("onnxruntime", "tensorrt", "torch", "cuda-bindings", "hart-runtime")
    return ", ".join(f"{k} {v}" for k, v in machine["libraries"].items() if k.lower().startswith(ours))


def _speed(folder: Path) -> Iterator[str]:
    """A row for every benchmark, then what each picture waits for."""
    found = {file.parent.name: file for file in sorted(folder.glob(f"*/{RESULT_FILE}"))}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items()}
    if not results:
        return
    references = sorted({row["name"] for result in results.values() for row in result["against"]})
    over = "".join(f" {reference} over it |" for reference in references)
    yield f"| | a picture, ms | first picture, s | GPU memory, GB |{over}"
    yield f"|---|{'---:|' * (3 + len(references))}"
    for name, result in results.items():
        ratios = {row["name"]: f"{row['ratio']['p50']:.2f}" for row in result["against"]}
        first = result["first_pictures"][0]
        memory = first["gpu_bytes"]
        yield (
            f"| {name} | {result['latency'][0]['seconds']['p50'] * 1e3:.1f} | {first['total']:.1f} | "
            f"{'' if memory is None else f'{memory / 1e9:.2f}'} |"
            + "".join(f" {ratios.get(reference, '')} |" for reference in references)
        )
    yield ""
    for name, result in results.items():
        yield f"- {name}: {bottleneck(result['breakdown'])}"


def bottleneck(breakdown: Mapping[str, Any]) -> str:
    """The stage that loses most time beyond what the device's peak asks for, and to what."""
    stages = breakdown["stages"]
    total = sum(_spent(stage) for stage in stages)
    worst = max(stages, key=lambda stage: _spent(stage) - (stage["floor"] or 0))
    spent, floor = _spent(worst), worst["floor"] or 0.0
    said = f"{worst['name']}, {spent * 1e3:.1f} of {total * 1e3:.1f} ms"
    if worst["name"] == HOST or worst["host"]["p50"] > worst["seconds"]["p50"]:
        return f"{said}, the host's work"
    if worst["floor"] is None:
        return f"{said}, nothing is counted for it"
    by = "operations" if worst["operations_share"] >= worst["bytes_share"] else "bytes"
    share = worst[f"{by}_share"]
    peak = "arithmetic" if by == "operations" else "memory"
    bound = f"bound by {peak}" if share >= HARD else "neither arithmetic nor memory is busy"
    return f"{said} where {floor * 1e3:.1f} would do, {bound} ({share:.0%} of the peak of {peak})"


def _spent(stage: Mapping[str, Any]) -> float:
    return float(stage["seconds"]["p50"] + stage["host"]["p50"])


def _rules(folder: Path) -> Iterator[str]:
    file = folder / RULES_FILE
    if file.is_file():
        for number, (word, sentence) in json.loads(file.read_text(encoding="utf-8")).items():
            if word != "holds":
                yield f"- rule {number}, {word}: {sentence}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
