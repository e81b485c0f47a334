"""Measures the demo: ``python -m hart_runtime.hart.demo.report``.

Reconstruction of both decoding paths, generation of held-out prompts judged by the rule-based
checker, and how far generated pictures are from drawn ones with and without the residual.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.console import PATH, command, sampling_options
from hart_runtime.common.install import require
from hart_runtime.common.settings import check_ranges
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.demo.checker import Verdict, look
from hart_runtime.hart.demo.draw import SIZE, draw_scene
from hart_runtime.hart.demo.scenes import Scene, split_scenes

if TYPE_CHECKING:
    from hart_runtime.common.checkpoint import HartCheckpoint
    from hart_runtime.common.settings import SamplingSettings
    from hart_runtime.hart.model import Hart


@command()
@click.option("--checkpoint", type=PATH, default=DEMO_CHECKPOINT)
@click.option("--split", type=click.Choice(["held-out", "training"]), default="held-out", show_default=True)
@click.option(
    "--images",
    type=click.IntRange(2, 10_000),
    default=200,
    show_default=True,
    help="Pictures to judge.",
)
@click.option("--size", type=int, help="Pixels along a side: judge smaller pictures beside the full ones.")
@sampling_options("the checkpoint's")
@click.option("--grid", type=PATH, help="Also write a sheet of the first 40 pictures.")
@click.option("--output", type=PATH, help="Also write the numbers as JSON.")
def main(
    checkpoint: Path,
    split: str,
    images: int,
    size: int | None,
    grid: Path | None,
    output: Path | None,
    **overrides: float | bool | None,
) -> None:
    """Measure a demo checkpoint."""
    require("hart_runtime.hart.demo.report", "export", "torch", "safetensors")
    from hart_runtime.hart.checkpoint import load_hart
    from hart_runtime.hart.demo.judging import features, frechet, generate_scenes, reconstruction, sheet

    found = find_checkpoint(checkpoint)
    model = load_hart(found)
    training, held_out = split_scenes()
    scenes = held_out if split == "held-out" else training
    rng = np.random.default_rng(7)
    chosen = [scenes[i] for i in rng.permutation(np.resize(np.arange(len(scenes)), images))]
    drawn = np.stack([draw_scene(scene, rng) for scene in chosen])
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = replace(found.sampling, **given)  # type: ignore[arg-type]
    check_ranges(settings, found.tokenizer_config)

    numbers: dict[str, float] = {}
    if size is not None:
        _compare_sizes(found, model, chosen, settings, size)
        return
    numbers |= reconstruction(model.tokenizer, drawn)
    others = np.stack([draw_scene(scene, rng) for scene in chosen])
    numbers["Frechet distance of two drawn sets"] = frechet(features(drawn), features(others))
    for name, residual in (("with residual", True), ("without residual", False)):
        if given.get("residual", residual) != residual:
            continue
        start = time.perf_counter()
        pictures = generate_scenes(found, model, chosen, replace(settings, residual=residual))
        seconds = (time.perf_counter() - start) / len(chosen)
        verdicts = [look(picture) for picture in pictures]
        right = [v.matches(s) for v, s in zip(verdicts, chosen, strict=True)]
        numbers[f"{name}: colour, shape and background right, %"] = 100 * float(np.mean(right))
        numbers[f"{name}: Frechet distance"] = frechet(features(drawn), features(pictures))
        numbers[f"{name}: seconds per picture"] = seconds
        if residual:
            _explain(chosen, verdicts, right)
            if grid:
                sheet(pictures[:40]).save(grid)
    for name, value in numbers.items():
        click.echo(f"{name:<60}{value:10.3f}")
    if output:
        output.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _compare_sizes(
    found: HartCheckpoint, model: Hart, scenes: list[Scene], settings: SamplingSettings, size: int
) -> None:
    """Judge pictures of a smaller size, and full ones through as few pixels, of the same seeds."""
    from hart_runtime.hart.demo.judging import generate_scenes, resized

    small = generate_scenes(found, model, scenes, settings, size)
    full = generate_scenes(found, model, scenes, settings)
    right = {}
    for name, pictures in (
        ("full size", full),
        (f"full size, scaled to {size} and back", resized(resized(full, size), SIZE)),
        (f"drawn with {size} pixels, scaled to {SIZE}", resized(small, SIZE)),
    ):
        verdicts = [look(picture) for picture in pictures]
        right[name] = np.array([v.matches(s) for v, s in zip(verdicts, scenes, strict=True)], float)
        shares = {
            part: 100
            * np.mean([getattr(v, part) == getattr(s, part) for v, s in zip(verdicts, scenes, strict=True)])
            for part in ("color", "shape", "background")
        }
        told = ", ".join(f"{part} {share:.1f}" for part, share in shares.items())
        click.echo(f"{name:<40} {told}, all {100 * right[name].mean():.1f} %")
    first, *_, last = right.values()
    off = 100 * (last - first)
    click.echo(
        f"difference of all: {off.mean():+.1f} ± {1.96 * off.std(ddof=1) / len(off) ** 0.5:.1f} points"
    )


def _explain(scenes: list[Scene], verdicts: list[Verdict], right: list[bool]) -> None:
    wrong: Counter[str] = Counter()
    for scene, verdict, ok in zip(scenes, verdicts, right, strict=True):
        if not ok:
            wrong[f"{scene.caption()} -> {verdict}"] += 1
    for line, count in wrong.most_common(10):
        click.echo(f"wrong {count}x: {line}")


if __name__ == "__main__":
    main()
