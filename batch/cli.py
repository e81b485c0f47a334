"""``hart-batch``: draws a file of prompts into a folder, in one process or on Ray."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart_runtime.common.bounds import bounds
from hart_runtime.common.console import PATH, WORD, FiniteRange, command, sampling_options
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.options import (
    backend_option,
    bundle_option,
    device_option,
    size_option,
    speed_option,
    threads_option,
)

if TYPE_CHECKING:
    from hart_runtime.batch.artist import Draw
    from hart_runtime.batch.output import Output
    from hart_runtime.hart.safety import SafetyModel

log = logging.getLogger(__name__)

MOST_ACTORS = 100_000


def _actors(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """A number, or two with dots between them."""
    if value is None:
        return None
    try:
        return bounds(value, MOST_ACTORS)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


@command(words={"source": "--safety-model"})
@click.argument("prompts", type=PATH)
@bundle_option
@click.option(
    "--output", required=True, type=PATH, help="Folder of pictures and table; what a run left there goes on."
)
@click.option("--seed", default=0, show_default=True, help="Picture N of rows without a seed has SEED + N.")
@click.option("--count", default=1, show_default=True, help="Pictures of rows that do not say how many.")
@speed_option
@size_option
@click.option("--preset", type=WORD, help="Settings by a name, such as VAR's fid. [default: the bundle's]")
@sampling_options("the bundle's")
@click.option("--batch", type=int, help="Pictures drawn at once. [default: the bundle's maximum]")
@click.option("--shards", is_flag=True, help="Write tar files, as webdataset reads them, of 1000 pictures.")
@device_option
@backend_option
@threads_option
@click.option(
    "--safety-model",
    type=WORD,
    metavar="PATH|ID",
    help="Ask this ShieldGemma about every prompt first; what it refuses is not drawn. [default: none]",
)
@click.option(
    "--ray", type=WORD, metavar="local|auto|ADDRESS", help="Draw on Ray. [default: in this process]"
)
@click.option(
    "--actors",
    metavar="N|MIN..MAX",
    callback=_actors,
    help="Processes of Ray's that draw. [default: as many as fit]",
)
@click.option(
    "--cpus", type=FiniteRange(0.01, 1024), help="CPUs of each of them. [default: 0.8, or 1 beside a GPU]"
)
@click.option(
    "--encoders",
    type=click.IntRange(1, MOST_ACTORS),
    help="Processes that encode prompts, with the text encoder that no other holds then. [default: all do]",
)
@click.option("--push", is_flag=True, help="Bring the bundle to Ray's nodes. [default: it lies there, too]")
def main(
    prompts: Path,
    bundle: Path,
    output: Path,
    size: int | None,
    batch: int | None,
    shards: bool,
    device: str,
    backend: str,
    threads: int | None,
    safety_model: str | None,
    ray: str | None,
    actors: tuple[int, int] | None,
    cpus: float | None,
    encoders: int | None,
    push: bool,
    **options: Any,
) -> None:
    """Draw every row of PROMPTS: a text file of a prompt (or class) a line, or .jsonl, .csv, .parquet."""
    from hart_runtime.common.install import require

    of_ray = {"actors": actors, "cpus": cpus, "encoders": encoders, "push": push or None}
    for name, given in of_ray.items():
        if given is not None and ray is None:
            raise InputError(f"`{name}`: is for `ray`, which is not given")
    require("hart-batch", "batch", "pyarrow")
    if ray is not None:
        require("`ray`", "ray", "ray")
    from hart_runtime.batch.artist import Means, alone
    from hart_runtime.batch.output import Run, check_run, open_output
    from hart_runtime.batch.plan import make_plan
    from hart_runtime.batch.progress import counted
    from hart_runtime.batch.rows import read_rows
    from hart_runtime.common.version import __version__
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.call import check_batch
    from hart_runtime.runtime.class_names import ClassNames
    from hart_runtime.runtime.editing import require_encoder
    from hart_runtime.runtime.outputs import refuse_inputs
    from hart_runtime.runtime.text import require_text_encoder

    opened = open_bundle(bundle).at_size(size)
    manifest = opened.manifest
    classes = ClassNames.of(opened) if manifest.model.num_classes else None
    if classes is None:
        require_text_encoder(opened)
    if safety_model is not None and classes is not None:
        raise InputError(f"`safety_model`: reads texts, and {bundle} draws classes")
    if batch is not None:
        check_batch(manifest, batch)
    refuse_inputs([output], opened.folder, prompts)
    plan = make_plan(read_rows(prompts), prompts, manifest, classes, **options)
    if plan.sources:
        require_encoder(opened)
    run = Run(plan.sha256, opened.identity, device, backend, shards, __version__, size)
    check_run(output, run)
    means = Means(opened.folder.absolute(), opened.identity, device, backend, threads, batch, size)
    model = _opened(safety_model)
    with contextlib.ExitStack() as stack:
        draw: Draw = functools.partial(alone, means)
        if ray is not None:
            from hart_runtime.batch.ray_data import on_ray

            draw = stack.enter_context(on_ray(ray, opened, means, actors, cpus, push, encoders or 0))
        there = stack.enter_context(open_output(output, plan, run))
        try:
            _refuse(there, model)
            model = None  # its memory is for who draws
            if left := there.left:
                total = len(plan.pictures)
                for finished in counted(draw(plan, left), total, total - len(left)):
                    there.add(finished)
        finally:
            there.end()
            _tell(there)


def _opened(safety_model: str | None) -> SafetyModel | None:
    from hart_runtime.hart.safety import SafetyModel

    return None if safety_model is None else SafetyModel(safety_model)


def _refuse(there: Output, model: SafetyModel | None) -> None:
    """Finish what cannot be drawn."""
    from hart_runtime.batch.output import Finished

    for picture in there.left:
        if picture.error is not None:
            there.add(Finished(picture.number, 0.0, error=picture.error))
    if model is not None and (left := there.left):
        refused = _screened(list(dict.fromkeys(picture.prompt for picture in left)), model)
        for picture in left:
            if (error := refused.get(picture.prompt)) is not None:
                there.add(Finished(picture.number, 0.0, error=error))


def _screened(texts: Iterable[str], model: SafetyModel) -> dict[str, str]:
    """Prompts that are not to be drawn, and why; no answer is no permission.

    Raises:
        RunError: it gives one prompt after another no answer.
    """
    from hart_runtime.batch.artist import MOST_FAILURES
    from hart_runtime.hart.safety import THRESHOLD

    refused: dict[str, str] = {}
    failures = 0
    for text in texts:
        try:
            (score,) = model([text])
        except RunError as error:
            failures += 1
            if failures == MOST_FAILURES:
                raise RunError(f"{MOST_FAILURES} prompts in a row without an answer: {error}") from None
            refused[text] = "the safety model gave no answer"
            continue
        failures = 0
        if score > THRESHOLD:
            refused[text] = f"refused by the safety model ({score:.2f})"
    return refused


def _tell(there: Output) -> None:
    """How far it came."""
    from hart_runtime.batch.output import TABLE

    total, done = len(there.plan.pictures), len(there.lines)
    if failed := sum("error" in line for line in there.lines.values()):
        log.warning("%d of %d pictures have an error in the table", failed, total)
    if done < total:
        click.echo(f"{done} of {total} pictures are done and kept; the same command goes on", err=True)
    else:
        click.echo(there.folder / TABLE)
