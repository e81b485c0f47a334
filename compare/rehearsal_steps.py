"""Single steps of the rehearsal, each to be run as a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.console import PATH, command, group
from hart_runtime.common.precisions import FP32
from hart_runtime.compare.rehearsal import CACHE, CAPTURED, CHECKPOINT, NO_SYSTEM_PROMPT, SEED
from hart_runtime.runtime.backends.backend import Backend, Outputs, Values, Watched
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import PAST
from hart_runtime.runtime.drawer import Drawer
from hart_runtime.runtime.families.names import TRANSFORMER
from hart_runtime.runtime.memory.plan import make_plan
from hart_runtime.runtime.pipeline import Pipeline, to_images
from hart_runtime.runtime.program import Run

PROMPT, CLASS = "a small blue star on a yellow background", "0"


class Capture(Watched):
    """A backend that also writes what the graphs of large scales are fed and what they return.

    ``NNN-GRAPH-SCALE.npz`` holds inputs and outputs of one run, those of the transformer without
    its cache: a cache only grows, so what the last scale is fed, in ``cache/``, begins with every other.
    """

    def __init__(self, backend: Backend, sides: Sequence[int], largest: int, folder: Path) -> None:
        super().__init__(backend, self._capture)
        self.folder = folder
        self._first = next((k for k, side in enumerate(sides) if side > largest), len(sides))
        self._last = len(sides) - 1
        self._scale = -1
        self._number = 0
        (folder / CACHE).mkdir(parents=True)

    def _capture(self, run: Run, inputs: Values, proceed: Callable[[Values], Outputs]) -> Outputs:
        self._scale += run.graph == TRANSFORMER
        fed = {}
        if self._scale >= self._first:
            fed = {f"in.{k}": self.to_host(v) for k, v in inputs.items() if not k.startswith(PAST)}
        if run.graph == TRANSFORMER and self._scale == self._last:
            for name in (k for k in inputs if k.startswith(PAST)):
                np.save(self.folder / CACHE / f"{name.removeprefix(PAST)}.npy", self.to_host(inputs[name]))
        outputs = proceed(inputs)
        if fed:
            kept = {f"out.{k}": self.to_host(v) for k, v in outputs.items() if not k.startswith(PAST)}
            held: dict[str, Any] = {**fed, **kept}
            np.savez(self.folder / f"{self._number:03}-{run.graph}-{self._scale}.npz", **held)
            self._number += 1
        return outputs


@group()
@click.option("--largest", required=True, type=int, help="Side of the largest scale that is left to others.")
@click.pass_context
def main(context: click.Context, largest: int) -> None:
    """One step of the rehearsal, in the current folder."""
    context.obj = largest


@command(name="open")
@click.argument("bundle", type=PATH)
def open_(bundle: Path) -> None:
    """Verify BUNDLE and open its sessions."""
    start = time.perf_counter()
    opened = open_bundle(bundle)
    verified = time.perf_counter()
    open_backend(opened, "cpu")
    click.echo(f"verified in {verified - start:.0f} s, opened in {time.perf_counter() - verified:.0f} s")


@command(name="draw")
@click.argument("bundle", type=PATH)
@click.option("--output", "folder", type=PATH, default=CAPTURED)
@click.pass_obj
def draw_(largest: int, bundle: Path, folder: Path) -> None:
    """Draw one picture with BUNDLE on the CPU, as hart-run does, and keep what later scales were fed."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    words = [CLASS if manifest.model.num_classes else PROMPT]
    pipeline = Pipeline.for_prompts(opened, words, 1, lambda part: open_backend(part, "cpu"))
    backend = Capture(pipeline.backend, manifest.model.patch_nums, largest, folder)
    given = pipeline.given(words)
    drawn = Drawer(pipeline.bundle.manifest, backend)(given, [SEED], manifest.sampling)
    image = to_images(drawn.images)[0]
    image.save(folder / "picture.png")
    cache = make_plan(manifest.program(manifest.sampling, 1)).cache_nbytes
    described = {"cache_bytes": cache, "seconds": drawn.seconds}
    (folder / "drawing.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{image.width} x {image.height} px, {len(manifest.model.patch_nums)} scales, seed {SEED}")
    click.echo(f"KV cache {cache / 1e9:.2f} GB")
    for stage, seconds in drawn.seconds.items():
        click.echo(f"{stage}: {seconds:.1f} s")


@command(name="export-prefix")
@click.argument("output", type=PATH)
@click.pass_obj
def export_prefix(largest: int, output: Path) -> None:
    """Export the checkpoint with the scales up to the largest: the same weights, fewer tokens."""
    from hart_runtime.export.bundle import export_bundle
    from hart_runtime.export.request import Request

    checkpoint = find_checkpoint(Path(CHECKPOINT))
    sides = tuple(side for side in checkpoint.llm_config.patch_nums if side <= largest)
    request = Request(checkpoint, FP32, system_prompt=NO_SYSTEM_PROMPT, patch_nums=sides)
    export_bundle(request, output)


@command(name="compare")
@click.argument("bundle", type=PATH)
def compare_(bundle: Path) -> None:
    """Hold everything that was captured against the reference; exit code 1 if something is off."""
    from hart_runtime.compare.large_scales import compare_captured

    fine = True
    for line, ok in compare_captured(Path(CHECKPOINT), open_bundle(bundle).manifest, Path(CAPTURED)):
        click.echo(f"{line}: {'within' if ok else 'NOT within'} tolerance")
        fine &= ok
    sys.exit(0 if fine else 1)


for step in (open_, draw_, export_prefix, compare_):
    main.add_command(step)

if __name__ == "__main__":
    main()
