"""Compares models of classes: ``python -m hart_runtime.hart.demo.class_report``.

The papers' class-conditional comparison in small: HART with its residual, the same without, and a VAR and
a MAR of equal width and depth that were trained for as many steps on the same pictures. All draw the same
classes from the same seeds, batch by batch in turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from hart_runtime.common.console import PATH, command, sampling_options
from hart_runtime.common.install import require
from hart_runtime.common.settings import SamplingSettings, check_ranges
from hart_runtime.hart.demo import CLASS_DEMO, CLASS_MAR, CLASS_VAR
from hart_runtime.hart.demo.checker import look
from hart_runtime.hart.demo.draw import draw_scene
from hart_runtime.hart.demo.scenes import CLASSES, Scene, all_scenes

if TYPE_CHECKING:
    from hart_runtime.hart.demo.judging import Array
    from hart_runtime.hart.frechet import Doubles
    from hart_runtime.hart.model import ClassModel, Mar

WITH, WITHOUT, VAR, MAR = "HART", "HART without its residual", "VAR of equal width", "MAR of equal width"
HEADS = "4"
"""Of the demo's MAR, which no tensor tells."""
DRAWN = "drawn by the project"
"""What stands for the truth: other pictures of the same scenes."""


@dataclass(frozen=True)
class Row:
    """What is said of one model's pictures."""

    filters: float
    """Frechet distance to drawn pictures on :func:`hart_runtime.hart.demo.judging.features`."""
    encoder: float
    """The same on :func:`hart_runtime.hart.demo.judging.encoder_features`."""
    colour: float
    shape: float
    """Per cent of pictures whose colour, and whose shape, is that of the class."""
    both: float
    milliseconds: float | None
    """A picture of a batch, median of all batches."""


@command()
@click.option("--checkpoint", type=PATH, default=CLASS_DEMO, help="A HART of classes. [default: the demo's]")
@click.option("--var", type=PATH, default=CLASS_VAR, help="A VAR of the same classes. [default: the demo's]")
@click.option("--mar", type=PATH, default=CLASS_MAR, help="A MAR of the same. [default: the demo's]")
@click.option("--heads", default=HEADS, show_default=True, help="Of the MAR, which its files do not tell.")
@click.option(
    "--images",
    type=click.IntRange(2, 10_000),
    default=450,
    show_default=True,
    help="Pictures of each model, as many of every class as of any other.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the first picture."
)
@sampling_options("the checkpoint's")
@click.option("--grid", type=PATH, help="Also write a sheet of every model's first 8 pictures of 5 batches.")
@click.option("--output", type=PATH, help="Also write the numbers as JSON.")
def main(
    checkpoint: Path,
    var: Path,
    mar: Path,
    heads: str,
    images: int,
    seed: int,
    grid: Path | None,
    output: Path | None,
    **overrides: float | bool | None,
) -> None:
    """Compare a HART of classes with and without its residual, with a VAR, and with a MAR if it is there.

    Settings are HART's, and VAR's too; a MAR has its own.
    """
    require("hart_runtime.hart.demo.class_report", "export", "torch", "safetensors")
    from hart_runtime.hart import checkpoints
    from hart_runtime.hart.demo.judging import encoder_features, features, frechet, reconstruction, sheet
    from hart_runtime.hart.find import find
    from hart_runtime.hart.model import Hart, Mar

    found = find(checkpoint)
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = replace(found.sampling, **given)  # type: ignore[arg-type]
    check_ranges(settings, found.tokenizer_config)
    hart, other = checkpoints.load(found), checkpoints.load(find(var))
    assert not isinstance(hart, Hart | Mar)
    assert not isinstance(other, Hart | Mar)
    models: dict[str, tuple[ClassModel | Mar, SamplingSettings]] = {
        WITH: (hart, replace(settings, residual=True)),
        WITHOUT: (hart, replace(settings, residual=False)),
        VAR: (other, replace(settings, residual=False)),
    }
    if mar.exists():
        masked = find(mar, heads=heads)
        drawing = checkpoints.load(masked)
        assert isinstance(drawing, Mar)
        models[MAR] = (drawing, masked.sampling)
    rng = np.random.default_rng([seed, 8])  # the trainer's begin with two other numbers
    scenes = _scenes(images, rng)
    truth, again = (np.stack([draw_scene(scene, rng) for scene in scenes]) for _ in range(2))
    pictures, seconds = _in_turns(models, [scene.label for scene in scenes], seed)
    pictures[DRAWN] = again

    def of_encoder(drawn: Array) -> Doubles:
        return encoder_features(hart.tokenizer, drawn)

    rows = {}
    for name, drawn in pictures.items():
        verdicts = [look(picture) for picture in drawn]
        colour, shape = (
            np.array([getattr(v, part) == getattr(s, part) for v, s in zip(verdicts, scenes, strict=True)])
            for part in ("color", "shape")
        )
        rows[name] = Row(
            filters=frechet(features(truth), features(drawn)),
            encoder=frechet(of_encoder(truth), of_encoder(drawn)),
            colour=100 * float(np.mean(colour)),
            shape=100 * float(np.mean(shape)),
            both=100 * float(np.mean(colour & shape)),
            milliseconds=seconds.get(name),
        )
    psnr = reconstruction(hart.tokenizer, truth)
    click.echo(f"{images} pictures of each model, seeds {seed} to {seed + images - 1}, {settings}")
    for line in table(rows):
        click.echo(line)
    for name, value in psnr.items():
        click.echo(f"{name}: {value:.2f}")
    if grid:
        shown = [pictures[name][b * 45 : b * 45 + 8] for b in range(5) for name in models]
        sheet(np.concatenate(shown)).save(grid)
    if output:
        told = {"models": {name: asdict(row) for name, row in rows.items()}, **psnr}
        output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def table(rows: dict[str, Row]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [
        "| pictures | Frechet, filters | Frechet, encoder | colour, % | shape, % | both, % | ms a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        taken = "" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        shares = " | ".join(f"{share:.1f}" for share in (row.colour, row.shape, row.both))
        lines.append(f"| {name} | {row.filters:.1f} | {row.encoder:.2f} | {shares} | {taken} |")
    return lines


def _scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Of all classes in turn; size and background are anything."""
    of_class: list[list[Scene]] = [[] for _ in CLASSES]
    for scene in all_scenes():
        of_class[scene.label].append(scene)
    return [of_class[i % len(CLASSES)][rng.integers(len(of_class[i % len(CLASSES)]))] for i in range(count)]


def _in_turns(
    models: dict[str, tuple[ClassModel | Mar, SamplingSettings]], labels: list[int], seed: int
) -> tuple[dict[str, Array], dict[str, float]]:
    """Pictures of every model, and its milliseconds a picture."""
    from hart_runtime.hart.demo.judging import BATCH, draw_labels

    parts: dict[str, list[Array]] = {name: [] for name in models}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for start in range(0, len(labels), BATCH):
        part = labels[start : start + BATCH]
        for name, (model, settings) in models.items():
            began = time.perf_counter()
            parts[name].append(draw_labels(model, part, seed + start, settings))
            taken[name].append((time.perf_counter() - began) / len(part))
    medians = {name: 1000 * float(np.median(values)) for name, values in taken.items()}
    return {name: np.concatenate(drawn) for name, drawn in parts.items()}, medians


if __name__ == "__main__":
    main()
