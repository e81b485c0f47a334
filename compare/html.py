"""``report.html``: one file with everything in it, for people."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from hart_runtime.common.files import whole_file
from hart_runtime.compare.metrics import Picture
from hart_runtime.compare.place import TITLE
from hart_runtime.compare.reference import Reference
from hart_runtime.compare.replay import Row
from hart_runtime.compare.report import Run, layer_lines, loop_lines, number, worst_rows
from hart_runtime.compare.trajectory import Trajectory
from hart_runtime.runtime.pipeline import to_images

AMPLIFIED = 16
"""Differences are shown this many times as large, around grey."""
THUMBNAIL = 192
WIDTH, HEIGHT, MARGIN = 900, 320, 60
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
FLOOR = 1e-9
"""Smaller errors are drawn here, zero among them: the axis is logarithmic."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: 2px 10px; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #8881; }
.failed { color: #c00; font-weight: bold; } figure { display: inline-block; margin: 0 8px 8px 0; }
figcaption { font-size: 12px; } img { image-rendering: pixelated; } pre { overflow-x: auto; }
"""


def save_html(reference: Reference, runs: list[Run], path: Path) -> None:
    """Write the report for people."""
    verdict = "within tolerance" if all(run.passed for run in runs) else "NOT within tolerance"
    made = ", ".join(f"{key} {value}" for key, value in reference.made_with.items())
    body = "".join(_section(reference, run) for run in runs)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{TITLE}{verdict}</title>'
        f"<style>{STYLE}</style><h1>How far from PyTorch: {verdict}</h1>"
        f"<p>Reference: float32, {escape(made)}; scales {list(reference.patch_nums)}.</p>{body}</html>\n"
    )
    with whole_file(path) as file:
        file.write(text.encode())


def _section(reference: Reference, run: Run) -> str:
    candidate = run.candidate
    lines = loop_lines(run) + (layer_lines(run.layers) if run.layers else [])
    unused = f"<p>Not used with these settings: {', '.join(run.not_run)}.</p>" if run.not_run else ""
    return (
        f"<h2>{escape(candidate.name)} on {candidate.backend}, {escape(candidate.device)}</h2>"
        f"<p>{candidate.precision} bundle, {candidate.arithmetic}; identity {candidate.identity[:16]}; "
        f"{escape(candidate.version)}.</p><pre>{escape(chr(10).join(lines))}</pre>"
        f"{_strips(reference, run)}<h3>Error over the loop</h3>{_plot(run.rows)}"
        f"<h3>Worst call of every output</h3>{_table(run.rows)}{unused}"
    )


def _strips(reference: Reference, run: Run) -> str:
    parts = ["<h3>Pictures</h3>"]
    index = 0
    for batch, tensors in enumerate(reference.batches):
        pictures = tensors["image"]
        for row, picture in enumerate(pictures):
            prompt = reference.prompts[index] if reference.prompts else f"picture {index}"
            shown = [_figure(picture, "reference")]
            for title, results in (
                ("teacher-forced", run.teacher_forced),
                ("free-running", run.free_running),
            ):
                shown += _pair(picture, results[batch], row, title)
            parts.append(f"<p>{escape(prompt)}</p><div>{''.join(shown)}</div>")
            index += 1
    return "".join(parts)


def _pair(reference: Picture, result: Trajectory, row: int, title: str) -> list[str]:
    if result.pictures is None:
        return [f'<figure class="failed">{title}: {escape(result.failure or "no picture")}</figure>']
    found = result.pictures.images[row]
    difference = np.clip((found - reference) * AMPLIFIED / 2 + 0.5, 0, 1)
    return [_figure(found, title), _figure(difference, f"its difference x{AMPLIFIED}")]


def _figure(picture: Picture, caption: str) -> str:
    buffer = io.BytesIO()
    image: Image.Image = to_images(picture[None])[0]
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img width="{THUMBNAIL}" alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _plot(rows: list[Row]) -> str:
    """Judged error of every call of the first batch in the order of the loop, a line per graph."""
    calls: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.batch == 0:
            error = math.nan if row.errors.error is None else row.errors.error
            key = (row.graph, row.call)
            calls[key] = max(calls.get(key, 0.0), error) if not math.isnan(error) else math.nan
    places = {key: i for i, key in enumerate(calls)}
    finite = [value for value in calls.values() if not math.isnan(value)]
    top = max(0, math.ceil(math.log10(max([FLOOR, *finite]))))
    bottom = round(math.log10(FLOOR))
    step = (WIDTH - 2 * MARGIN) / max(len(calls) - 1, 1)

    def x(key: tuple[str, str]) -> float:
        return MARGIN + places[key] * step

    def y(value: float) -> float:
        level = math.log10(max(value, FLOOR))
        return MARGIN / 2 + (top - level) / (top - bottom) * (HEIGHT - MARGIN)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 40}" width="100%" font-size="11">']
    for exponent in range(bottom, top + 1):
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(10.0**exponent):.1f}" '
            f'y2="{y(10.0**exponent):.1f}" stroke="#8884"/><text x="{MARGIN - 8}" '
            f'y="{y(10.0**exponent) + 4:.1f}" text-anchor="end" fill="currentColor">1e{exponent}</text>'
        )
    for i, graph in enumerate(dict.fromkeys(graph for graph, _ in calls)):
        color = COLORS[i % len(COLORS)]
        mine = [key for key in calls if key[0] == graph]
        points = " ".join(f"{x(k):.1f},{y(calls[k]):.1f}" for k in mine if not math.isnan(calls[k]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-opacity="0.6"/>')
        for key in mine:
            label = escape(f"{graph} {key[1]}: {number(None if math.isnan(calls[key]) else calls[key])}")
            height = MARGIN / 4 if math.isnan(calls[key]) else y(calls[key])
            shape = "#c00" if math.isnan(calls[key]) else color
            parts.append(
                f'<circle cx="{x(key):.1f}" cy="{height:.1f}" r="3.5" fill="{shape}">'
                f"<title>{label}</title></circle>"
            )
        parts.append(
            f'<text x="{MARGIN + i * 85}" y="{HEIGHT + 20}" fill="{color}">'
            f"{graph.replace('residual', 'res')}</text>"
        )
    return "".join([*parts, "</svg>"])


def _table(rows: list[Row]) -> str:
    names = "output,worst call,shape,range,max abs,mean abs,median abs,p99 abs,p99 rel,cosine,error,allowed"
    head = f"<tr>{''.join(f'<th>{column}</th>' for column in names.split(','))}</tr>"
    lines = []
    for row in worst_rows(rows):
        e = row.errors
        cells = [
            row.call,
            "x".join(map(str, e.shape)),
            f"{number(e.reference_min)} .. {number(e.reference_max)}",
        ]
        cells += [number(v) for v in (e.max_abs, e.mean_abs, e.median_abs, e.p99_abs, e.p99_rel)]
        cells += ["-" if e.cosine is None else f"{e.cosine:.7f}", number(e.error), number(row.tolerance)]
        kind = "" if row.passed else ' class="failed"'
        lines.append(
            f"<tr{kind}><td>{row.graph}: {row.output}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
        )
    return f"<table>{head}{''.join(lines)}</table>"
