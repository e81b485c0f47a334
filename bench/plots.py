"""Plots of a result: where a picture's time goes, and what batches bring."""

from __future__ import annotations

from pathlib import Path

from hart_runtime.bench.result import Result
from hart_runtime.bench.sustained import Sustained
from hart_runtime.bench.timing import HOST
from hart_runtime.runtime.stages import (
    CONTEXT,
    DECODER,
    RESIDUAL,
    SAMPLING_PART,
    TEXT_ENCODER,
    TRANSFORMER_PART,
    scale_and_part,
)

SCALES, BATCHES, SUSTAINED = "scales.png", "batches.png", "sustained.png"
GRAPHS = "graphs"
"""The part of a bar that has no parts."""


def write_plots(result: Result, folder: Path) -> tuple[str, ...]:
    """Write the plots; returns their names. Latency over batch needs two batch sizes."""
    _plot_scales(result, folder / SCALES)
    if len(result.latency) == 1:
        return (SCALES,)
    _plot_batches(result, folder / BATCHES)
    return SCALES, BATCHES


def _plot_scales(result: Result, file: Path) -> None:
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, float]] = {}
    for stage in result.breakdown.stages:
        bar, part = scale_and_part(stage.name) or (_bar(stage.name), GRAPHS)
        heights = bars.setdefault(bar, {})
        heights[part] = heights.get(part, 0.0) + stage.seconds.p50 * 1e3
        heights[HOST] = heights.get(HOST, 0.0) + stage.host.p50 * 1e3
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(bars)
    for part in (TRANSFORMER_PART, SAMPLING_PART, GRAPHS, HOST):
        heights_ = [bar.get(part, 0.0) for bar in bars.values()]
        axes.bar(list(bars), heights_, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights_, strict=True)]
    axes.set_ylabel("ms")
    axes.set_title(f"{result.bundle['name']}, {result.bundle['precision']}, {result.device}")
    axes.tick_params("x", rotation=60)
    axes.legend()
    figure.savefig(file, dpi=120)


def _bar(stage: str) -> str:
    """Small stages share a bar."""
    if stage.startswith(RESIDUAL):
        return RESIDUAL
    names = {TEXT_ENCODER: "text", CONTEXT: "text", DECODER: DECODER, HOST: "after"}
    return names.get(stage, stage)


def _plot_batches(result: Result, file: Path) -> None:
    from matplotlib.figure import Figure

    rows = sorted(result.latency, key=lambda row: row.batch)
    batches = [row.batch for row in rows]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("p50", "p90"):
        axes.plot(
            batches, [getattr(row.seconds, name) * 1e3 for row in rows], marker="o", label=f"{name}, ms"
        )
    rate = axes.twinx()
    rate.plot(batches, [row.pictures_per_second for row in rows], "k--", marker="s", label="pictures/s")
    rate.set_ylabel("pictures/s")
    rate.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_xticks(batches)
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=120)


def plot_sustained(found: Sustained, folder: Path) -> str:
    """Write how long batches took over time, beside temperature and clocks; returns its name."""
    from matplotlib.figure import Figure

    looks = {
        "degrees Celsius": [(look.at, look.celsius) for look in found.looks if look.celsius is not None],
        "MHz": [(look.at, look.mhz) for look in found.looks if look.mhz is not None],
    }
    looks = {name: points for name, points in looks.items() if points}
    figure = Figure(figsize=(9, 2.5 + 1.8 * len(looks)), layout="constrained")
    first, *others = figure.subplots(1 + len(looks), sharex=True, squeeze=False)[:, 0]
    first.plot(*zip(*found.drawn, strict=True), ".", markersize=3, alpha=0.5)
    for name in ("p50", "p99"):
        heights = [getattr(minute, name) for minute in found.minutes]
        first.step(
            [minute.begins for minute in found.minutes], heights, where="post", label=f"{name} of each minute"
        )
    first.set_ylabel("s a batch")
    first.set_ylim(bottom=0)
    first.legend()
    first.set_title(
        f"{found.bundle['name']}, {found.bundle['precision']}, {found.device}, batch {found.batch}"
    )
    for axes, (name, points) in zip(others, looks.items(), strict=True):
        axes.plot(*zip(*points, strict=True))
        axes.set_ylabel(name)
    (others or [first])[-1].set_xlabel("s")
    figure.savefig(folder / SUSTAINED, dpi=120)
    return SUSTAINED
