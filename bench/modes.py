"""What drawing with less costs and gains: ``python -m hart_runtime.bench.modes``.

Every choice of what is left out beside the exact picture: how far its pictures are, on the demo, whose
pictures rules can judge; how long it takes, in turns; and what it has to compute. Pictures of a choice have
the prompts and seeds of the exact ones, so that differences are those of pairs. No row comes without the
number of its pictures or turns, their seeds and a standard error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hart_runtime.bench.host import BYTES, OPERATIONS
from hart_runtime.bench.report import Section, markdown, print_sections
from hart_runtime.bench.workload import begin
from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import InputError
from hart_runtime.common.install import require
from hart_runtime.common.settings import EXACT, SPEEDS, Overrides, SamplingSettings
from hart_runtime.compare.metrics import IDENTICAL_PSNR
from hart_runtime.runtime.options import backend_option, device_option, threads_option
from hart_runtime.runtime.pipeline import Pipeline, to_images
from hart_runtime.runtime.work import Work, count

Pictures = NDArray[np.float32]
"""(N, H, W, 3) in [0, 1]."""

MODES: dict[str, Overrides | None] = {
    **dict.fromkeys(SPEEDS),
    "unguided 1": {"unguided_scales": 1},
    "unguided 2": {"unguided_scales": 2},
    "prune": {"prune": True},
    "prune, unguided 1": {"prune": True, "unguided_scales": 1},
    "prune, unguided 2": {"prune": True, "unguided_scales": 2},
}
"""By the name of a speed, which is the bundle's own, or of what is left out."""

FILE_WIDTH = 160
"""Columns of a table where no terminal says how wide it is."""


@dataclass(frozen=True)
class Quality:
    """Pictures of a choice, beside the exact ones."""

    n: int
    first_seed: int
    left_out: str
    right: float
    """Of 100, of colour, shape and background that were asked for."""
    difference: float
    """From exact, in points, of pairs."""
    error: float
    """Its standard error."""
    psnr: float
    """Median, in dB, to the exact pictures."""
    ssim: float
    frechet: float
    """Distance from pictures that were drawn by rules, see the demo's report."""


@dataclass(frozen=True)
class Speed:
    """Times of a choice, in turns with the others."""

    n: int
    left_out: str
    seconds: float
    """Median, of a picture."""
    ratio: float
    """How many times as fast as exact; mean over turns."""
    error: float
    """Its standard error."""
    operations: float
    bytes: float
    floor: float
    """Seconds on a GPU that did nothing but wait for its slower half: computed, not measured."""


@command(words={"bundles": "--engine"})
@click.option("--demo", type=PATH, help="Bundle of the demo, whose pictures are judged.")
@click.option("--engine", "bundles", type=PATH, multiple=True, help="Bundle that is timed; several times.")
@click.option("--pictures", default=1000, show_default=True, type=click.IntRange(2, 10_000))
@click.option("--turns", default=5, show_default=True, type=click.IntRange(2, 1000))
@click.option(
    "--mode",
    "modes",
    type=click.Choice([*MODES]),
    multiple=True,
    help="Beside exact; several. [default: all]",
)
@device_option
@backend_option
@threads_option
@click.option(
    "--output", type=PATH, help="Also write the numbers as JSON, and one table beside it as Markdown."
)
def main(
    demo: Path | None,
    bundles: tuple[Path, ...],
    pictures: int,
    turns: int,
    modes: tuple[str, ...],
    device: str,
    backend: str,
    threads: int | None,
    output: Path | None,
) -> None:
    """Compare the choices of what is left out of a drawing."""
    if demo is None and not bundles:
        raise InputError("nothing to compare: give `demo`, or `bundles`")
    from rich.console import Console

    console, tables = Console(), []
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    found: dict[str, dict[str, object]] = {}
    if demo is not None:
        require("hart_runtime.bench.modes", "export", "torch")
        require("hart_runtime.bench.modes", "compare", "skimage")
        pipeline = Pipeline.load(demo, device, threads, backend)
        qualities = judged(pipeline, modes_of(pipeline, modes), pictures)
        found = {name: {"pictures": asdict(quality)} for name, quality in qualities.items()}
        tables.append(table(demo.name, QUALITY, qualities, JUDGED))
        print_sections(tables[-1:], console)
    for bundle in bundles:
        pipeline = Pipeline.load(bundle, device, threads, backend)
        speeds = timed(pipeline, modes_of(pipeline, modes), turns)
        for name, speed in speeds.items():
            found.setdefault(name, {})[bundle.name] = asdict(speed)
        tables.append(table(bundle.name, SPEED, speeds, TIMED))
        print_sections(tables[-1:], console)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text("\n".join(markdown(joined(tables))) + "\n", encoding="utf-8")


def modes_of(pipeline: Pipeline, names: Sequence[str] = ()) -> dict[str, SamplingSettings]:
    """The choices that a model has, exact first; those of these names, or all."""
    manifest = pipeline.bundle.manifest
    found: dict[str, SamplingSettings] = {}
    for name in [name for name in MODES if name in {EXACT, *(names or MODES)}]:
        choice = MODES[name] or manifest.at_speed(name)
        if not any(choice.get(key) for key in manifest.lacks):
            settings = replace(manifest.sampling, **{**SPEEDS[EXACT], **choice})
            if settings not in found.values():  # as a speed is named otherwise, too
                found[name] = settings
    return found


def judged(
    pipeline: Pipeline, modes: Mapping[str, SamplingSettings], pictures: int, first_seed: int = 0
) -> dict[str, Quality]:
    """Held-out prompts of the demo, drawn with every choice, exact first."""
    from hart_runtime.compare.metrics import psnr, ssim
    from hart_runtime.hart.demo.checker import look
    from hart_runtime.hart.demo.draw import draw_scene
    from hart_runtime.hart.demo.judging import features, frechet
    from hart_runtime.hart.demo.scenes import split_scenes

    held_out = split_scenes()[1]
    rng = np.random.default_rng(first_seed)
    scenes = [held_out[i] for i in rng.permutation(np.resize(np.arange(len(held_out)), pictures))]
    jobs = [(scene.caption(), first_seed + number) for number, scene in enumerate(scenes)]
    by_rules = features(np.stack([draw_scene(scene, rng) for scene in scenes]))
    exact: Pictures | None = None
    right: NDArray[np.float64] | None = None
    found = {}
    for name, settings in modes.items():
        drawn = drawn_with(pipeline, jobs, settings)
        exact = drawn if exact is None else exact
        fine = np.array([float(look(p).matches(s)) for p, s in zip(drawn, scenes, strict=True)])
        right = fine if right is None else right
        pairs = [(a.transpose(2, 0, 1), b.transpose(2, 0, 1)) for a, b in zip(exact, drawn, strict=True)]
        found[name] = Quality(
            n=pictures,
            first_seed=first_seed,
            left_out=told(settings),
            right=100 * fine.mean(),
            difference=100 * (fine - right).mean(),
            error=100 * _standard_error(fine - right),
            psnr=float(np.median([psnr(a, b) for a, b in pairs])),
            ssim=float(np.mean([ssim(a, b) or 0.0 for a, b in pairs])),
            frechet=frechet(by_rules, features(drawn)),
        )
    return found


def drawn_with(pipeline: Pipeline, jobs: Sequence[tuple[str, int]], settings: SamplingSettings) -> Pictures:
    """Pictures of prompts with seeds of their own."""
    images = [image for result in pipeline.jobs(jobs, settings) for image in result.images]
    return np.stack([np.asarray(image, np.float32) / 255 for image in images])


def timed(pipeline: Pipeline, modes: Mapping[str, SamplingSettings], turns: int) -> dict[str, Speed]:
    """One picture of each choice after the other, again and again."""
    manifest = pipeline.bundle.manifest
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for turn in range(turns + 1):  # the first is for whatever is done once
        for name, settings in modes.items():
            draw = _alone(pipeline, settings)
            began = time.perf_counter()
            draw()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    exact = np.array(seconds[EXACT])
    found = {}
    for name, settings in modes.items():
        work = count(replace(manifest, sampling=settings), 1)
        whole = sum(work.values(), Work())
        ratios = exact / np.array(seconds[name])
        found[name] = Speed(
            n=turns,
            left_out=told(settings),
            seconds=float(np.median(seconds[name])),
            ratio=float(ratios.mean()),
            error=_standard_error(ratios),
            operations=whole.operations,
            bytes=whole.bytes,
            floor=sum(max(w.operations / OPERATIONS, w.bytes / BYTES) for w in work.values()),
        )
    return found


def _alone(pipeline: Pipeline, settings: SamplingSettings) -> Callable[[], object]:
    """Draws one picture of seed 0, from text features on."""
    given = begin(pipeline, 1)
    return lambda: to_images(pipeline.drawer(given, [0], settings).images)


def _standard_error(values: NDArray[np.float64]) -> float:
    """Of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def told(settings: SamplingSettings) -> str:
    """What settings leave out, in words."""
    parts = [f"tokens but {settings.keep}"] if settings.prune else []
    parts += [f"guidance of the last {settings.unguided_scales}"] if settings.unguided_scales else []
    return "; ".join(parts) or "nothing"


Columns = Mapping[str, Callable[[Any], str]]
"""Headings, and what stands below them."""
QUALITY: Columns = {
    "left out": lambda q: q.left_out,
    "pictures": lambda q: f"{q.n}, seeds from {q.first_seed}",
    "right %": lambda q: f"{q.right:.1f}",
    "points from exact": lambda q: f"{q.difference:+.2f} ± {q.error:.2f}",
    "PSNR dB": lambda q: "equal" if q.psnr >= IDENTICAL_PSNR else f"{q.psnr:.1f}",
    "SSIM": lambda q: f"{q.ssim:.3f}",
    "Frechet": lambda q: f"{q.frechet:.2f}",
}
JUDGED = "Right: colour, shape and background by the demo's rules; PSNR (median) and SSIM (mean) to exact."
SPEED: Columns = {
    "left out": lambda s: s.left_out,
    "turns": lambda s: f"{s.n}, seed 0",
    "seconds": lambda s: f"{s.seconds:.3f}",
    "times exact": lambda s: f"{s.ratio:.2f} ± {s.error:.2f}",
    "GFLOP": lambda s: f"{s.operations / 1e9:.1f}",
    "GB": lambda s: f"{s.bytes / 1e9:.2f}",
    "floor ms (computed)": lambda s: f"{s.floor * 1e3:.2f}",
}
TIMED = (
    f"Batch 1, from text features, in turns. Floor: computed, of a GPU of {OPERATIONS / 1e12:.0f} TFLOP/s "
    f"and {BYTES / 1e12:.1f} TB/s."
)


def table(title: str, columns: Columns, found: Mapping[str, object], note: str) -> Section:
    """A row for each choice."""
    rows = tuple((name, *(tell(row) for tell in columns.values())) for name, row in found.items())
    return Section(title, ("mode", *columns), rows, note)


def joined(tables: Sequence[Section]) -> Section:
    """Several tables of the same choices as one, each column under the name of its bundle."""
    names = list(dict.fromkeys(row[0] for found in tables for row in found.rows))
    rows = {name: [name] for name in names}
    for found in tables:
        cells = {row[0]: row[1:] for row in found.rows}
        for name in names:
            rows[name] += cells.get(name) or [""] * len(found.columns[1:])
    columns = (f"{found.title}: {column}" for found in tables for column in found.columns[1:])
    note = " ".join(dict.fromkeys(found.note for found in tables))
    return Section("Drawing less", ("mode", *columns), tuple(map(tuple, rows.values())), note)


if __name__ == "__main__":
    main()
