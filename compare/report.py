"""What a comparison found, as ``report.json`` and as a table.

``report.json`` has a schema number that changes when a field changes its meaning or goes::

    schema, passed
    reference    prompts, settings, scales, weights and versions of the reference
    limits       the numbers a run is judged by
    runs         one per backend:
      candidate        name, identity, precision, arithmetic, backend, device
      passed
      first_failure    graph, call, output and module of the first failure, or null
      graphs           a row per output of every graph call (see hart_runtime.compare.metrics.Errors)
      not_run          graphs that these settings do not use
      layers           a graph module by module, or null
      teacher_forced, free_running   a list with one entry per batch (see hart_runtime.compare.trajectory)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hart_runtime.common.files import whole_file
from hart_runtime.common.precisions import FP8, FP32, INT8
from hart_runtime.compare.reference import Reference
from hart_runtime.compare.replay import FACTOR, RELATIVE, Row
from hart_runtime.compare.trajectory import INDEX_AGREEMENT, PIXEL, PSNR, Trajectory
from hart_runtime.runtime.backends.names import ONNXRUNTIME, OPENVINO

if TYPE_CHECKING:
    from rich.table import Table

    from hart_runtime.compare.layers import LayerReport

SCHEMA_VERSION = 1
PICTURES = ("images",)
"""Fields that belong into report.html only."""


@dataclass(frozen=True)
class Limits:
    """What a run is judged by; see docs/accuracy.md."""

    relative: float = RELATIVE
    factor: float = FACTOR
    index_agreement: dict[str, float] = field(default_factory=lambda: dict(INDEX_AGREEMENT))
    psnr: dict[str, float] = field(default_factory=lambda: dict(PSNR))
    pixel: float = PIXEL


@dataclass(frozen=True)
class Candidate:
    """What was measured."""

    name: str
    identity: str
    precision: str
    arithmetic: str
    backend: str
    device: str
    version: str


@dataclass(frozen=True)
class Run:
    """One backend's results."""

    candidate: Candidate
    rows: list[Row]
    teacher_forced: list[Trajectory]
    free_running: list[Trajectory]
    not_run: list[str]
    layers: LayerReport | None = None

    @property
    def passed(self) -> bool:
        whole = (*self.teacher_forced, *self.free_running)
        return all(row.passed for row in self.rows) and all(t.passed for t in whole)

    @property
    def first_failure(self) -> Row | None:
        """In the order of the loop, every call on the reference's own inputs."""
        return next((row for row in self.rows if not row.passed), None)


def arithmetic(precision: str, backend: str, device: str) -> str:
    """What the numbers are computed in, in words.

    On the CPU half-precision graphs are computed in float32, so their result is not one of half
    precision.
    """
    if precision == FP32:
        return "float32"
    if precision == INT8:
        rest = "bfloat16 where the processor has it" if backend == OPENVINO else "float32"
        return f"8-bit products, the rest in {rest}"
    rounded = backend in (ONNXRUNTIME, OPENVINO) and device == "cpu"
    rest = "rounded weights, float32 arithmetic" if rounded else "float16"
    if precision == FP8:
        return f"8-bit floating point{' emulated' if rounded else ''}, the rest in {rest}"
    return rest


def as_json(reference: Reference, runs: list[Run], limits: Limits) -> dict[str, Any]:
    """The whole report as plain values."""
    return {
        "schema": SCHEMA_VERSION,
        "passed": all(run.passed for run in runs),
        "reference": {
            "prompts": reference.prompts,
            "settings": asdict(reference.settings),
            "patch_nums": list(reference.patch_nums),
            "weights": reference.weights,
            "made_with": reference.made_with,
        },
        "limits": asdict(limits),
        "runs": [_run_as_json(run) for run in runs],
    }


def save_json(report: dict[str, Any], path: Path) -> None:
    """Write the report; NaN cannot be in it."""
    with whole_file(path) as file:
        file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def worst_rows(rows: list[Row]) -> list[Row]:
    """The worst call of every output, blocks of the KV cache taken together.

    Worst is what failed first, and otherwise what came closest to its tolerance.
    """
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.graph, row.output.rstrip("0123456789"))
        if key not in worst or _badness(row) > _badness(worst[key]):
            worst[key] = row
    return list(worst.values())


def graph_table(run: Run) -> Table:
    """The worst call of every output."""
    from rich.table import Table
    from rich.text import Text

    title = f"{run.candidate.name} on {run.candidate.backend} ({run.candidate.arithmetic})"
    table = Table(title=Text(title))  # names are anybody's words
    for column in ("graph", "output", "worst call", "shape", "error", "allowed", "p99 abs", "cosine", ""):
        table.add_column(
            column, justify="right" if column in ("error", "allowed", "p99 abs", "cosine") else "left"
        )
    for row in worst_rows(run.rows):
        errors = row.errors
        table.add_row(
            row.graph,
            row.output,
            row.call,
            "x".join(map(str, errors.shape)),
            number(errors.error),
            number(row.tolerance),
            number(errors.p99_abs),
            "" if errors.cosine is None else f"{errors.cosine:.7f}",
            "ok" if row.passed else "FAILED" if errors.finite else "NOT FINITE",
        )
    return table


def loop_lines(run: Run) -> list[str]:
    """Both loops in sentences, the worst batch of each."""
    lines = []
    for title, results in (("teacher-forced", run.teacher_forced), ("free-running", run.free_running)):
        for batch, result in enumerate(results):
            where = f"{title}, batch {batch}" if len(results) > 1 else title
            agreement = "no indices"
            if result.total_agreement is not None:
                agreement = f"{100 * result.total_agreement:.2f}% of indices agree"
            first = result.first_difference
            if first is not None:
                agreement += f" (first other: scale {first['scale']}, token {first['token']})"
            if result.pictures is None:
                end = f"no picture: {result.failure}"
            else:
                p = result.pictures
                similar = "" if p.ssim is None else f", SSIM {p.ssim:.5f}"
                learned = "" if p.lpips is None else f", LPIPS {p.lpips:.5f}"
                end = f"PSNR {p.psnr:.1f} dB{similar}{learned}, "
                end += f"largest pixel difference {p.max_pixel_error:.2e}"
            lines.append(f"{where}: {agreement}; {end}: {'ok' if result.passed else 'FAILED'}")
    return lines


def layer_lines(report: LayerReport, neighbours: int = 3) -> list[str]:
    """The first place past its tolerance with its neighbours, or a line that there is none."""
    where = f"{report.graph} at {report.call}"
    if report.first is None:
        return [f"{where}: all {len(report.layers)} compared places are within tolerance"]
    lines = [f"{where}: the difference begins in {report.module}"]
    start = max(report.first - neighbours, 0)
    for i, layer in enumerate(report.layers[start : report.first + neighbours + 1], start):
        mark = ">" if i == report.first else " "
        lines.append(
            f" {mark} {layer.module} {layer.value}: error {number(layer.error)}, "
            f"allowed {number(layer.tolerance)}"
        )
    return lines


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _badness(row: Row) -> float:
    if row.errors.error is None:
        return math.inf
    return row.errors.error / (row.tolerance or 1e-12)


def _run_as_json(run: Run) -> dict[str, Any]:
    failure = run.first_failure
    module = run.layers.module if run.layers and failure and run.layers.graph == failure.graph else None
    return {
        "candidate": asdict(run.candidate),
        "passed": run.passed,
        "first_failure": None
        if failure is None
        else {"graph": failure.graph, "call": failure.call, "output": failure.output, "module": module},
        "graphs": [_row_as_json(row) for row in run.rows],
        "not_run": run.not_run,
        "layers": asdict(run.layers) if run.layers else None,
        "teacher_forced": [_trajectory_as_json(t) for t in run.teacher_forced],
        "free_running": [_trajectory_as_json(t) for t in run.free_running],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    values = asdict(row)
    errors = values.pop("errors")
    return {**values, **errors, "shape": list(row.errors.shape)}


def _trajectory_as_json(trajectory: Trajectory) -> dict[str, Any]:
    values = asdict(trajectory)
    if values["pictures"] is not None:
        for name in PICTURES:
            del values["pictures"][name]
    return values
