"""``hart-run``: draws prompts with an exported bundle."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart_runtime.common.console import PATH, WORD, command, sampling_options
from hart_runtime.common.ending import Command
from hart_runtime.common.errors import InputError, shown, told_of
from hart_runtime.runtime.options import (
    PICTURE,
    backend_option,
    bundle_option,
    device_option,
    picture_options,
    safety_option,
    size_option,
    speed_option,
    threads_option,
)

if TYPE_CHECKING:
    from rich.status import Status

    from hart_runtime.runtime.backends.backend import Backend
    from hart_runtime.runtime.bundle import Bundle
    from hart_runtime.runtime.loop import Snapshot
    from hart_runtime.runtime.pipeline import Pipeline, Result
    from hart_runtime.runtime.png import Origin

log = logging.getLogger(__name__)

ABSENT = "hart_runtime.absent"
"""Where a command's context keeps which of its options a bundle has not got."""
HOW_IT_RUNS = frozenset(
    [
        *("bundle", "device", "backend", "strict", "threads", "batch"),
        *("from_image", "image", "output", "as_json", "safety_model"),
    ]
)
"""What may stand beside ``--from-image``: whatever else there is decides the picture, and is refused."""


class Drawing(Command):
    """hart-run: its help is without what the bundle in front of it has not got."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's; a bundle that cannot be read is told of when it is drawn with."""
        bundle = ctx.params.get("bundle")
        with contextlib.suppress(InputError):
            ctx.meta[ABSENT] = _absent(bundle) if bundle else frozenset()
        super().format_options(ctx, formatter)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those that there are."""
        return [param for param in super().get_params(ctx) if param.name not in ctx.meta.get(ABSENT, ())]


def _absent(bundle: Path) -> frozenset[str]:
    """Parameters that mean nothing to a bundle."""
    from hart_runtime.runtime.families.names import ENCODER
    from hart_runtime.runtime.find import find_bundle
    from hart_runtime.runtime.manifest import read_manifest

    manifest, _ = read_manifest(find_bundle(bundle))
    without = "safety_model" if manifest.model.num_classes else "labels"
    absent = [*manifest.lacks, without, *(() if manifest.presets else ("preset",))]
    return frozenset(absent if ENCODER in manifest.graphs else [*absent, *PICTURE])


@command(words={"path": "--output", "source": "--safety-model"}, cls=Drawing)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@bundle_option
@click.option(
    "--label",
    "labels",
    type=WORD,
    multiple=True,
    help="Class to draw, by number or name, or none; can be given several times. A PROMPT is one, too.",
)
@click.option(
    "--prompts-file", type=PATH, help="Text file with one prompt (or class) a line; - for standard input."
)
@click.option("--from-image", type=PATH, help="Draw a picture of hart-run again, from what it carries.")
@picture_options
@click.option("--num-images", default=1, show_default=True, help="Pictures per prompt: SEED, SEED+1, ...")
@click.option("--seed", default=0, show_default=True)
@click.option("--preset", type=WORD, help="Settings by a name, such as VAR's fid. [default: the bundle's]")
@speed_option
@size_option
@sampling_options("the bundle's")
@click.option("--batch", type=int, help="Pictures drawn at once. [default: the bundle's maximum]")
@click.option(
    "--output",
    type=PATH,
    help="PNG file, replaced if it is there; several pictures are numbered: out-0.png, out-1.png, ... "
    "[default: out.png, or out-2.png, ... where it is there]",
)
@device_option
@backend_option
@click.option(
    "--strict", is_flag=True, help="Refuse graphs of which ONNX Runtime CUDA leaves work to the CPU."
)
@click.option(
    "--tf32", is_flag=True, help="On a GPU, round the factors of float32 products to 10 bits: other pictures."
)
@safety_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    prompts: tuple[str, ...],
    bundle: Path,
    labels: tuple[str, ...],
    prompts_file: Path | None,
    from_image: Path | None,
    output: Path | None,
    device: str,
    backend: str,
    strict: bool,
    tf32: bool,
    safety_model: str | None,
    threads: int | None,
    size: int | None,
    as_json: bool,
    image: Path | None,
    mask: Path | None,
    outpaint: str | None,
    vary: int | None,
    anew: int,
    fit: str | None,
    paste: bool,
    reconstruct: bool,
    **options: Any,
) -> None:
    """Draw each PROMPT with the bundle in BUNDLE: a text, or the number or the name of a class."""
    import json
    import time

    start = time.perf_counter()
    from hart_runtime.common.files import clear_leftovers, resolved
    from hart_runtime.runtime.backends.registry import open_backend
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.call import checked_settings, words_of
    from hart_runtime.runtime.class_names import NONE, ClassNames
    from hart_runtime.runtime.given import PictureOptions, show_reconstruction
    from hart_runtime.runtime.outputs import DEFAULT_OUTPUT, places, refuse_inputs, tell_replaced
    from hart_runtime.runtime.picture_record import record_of
    from hart_runtime.runtime.pipeline import Pipeline, add_seconds, batch_size
    from hart_runtime.runtime.png import Origin, PngWriter, check_writable, means, read_origin
    from hart_runtime.runtime.prompts import as_typed, hint_at_quotes, read_prompts
    from hart_runtime.runtime.stages import LOAD

    texts = [*map(as_typed, (*prompts, *labels)), *(read_prompts(prompts_file) if prompts_file else [])]
    origin = read_origin(from_image) if from_image else None
    if origin is not None:
        _refuse_beside_an_image()
        texts = [origin.prompt]
        options |= {"seed": origin.seed, **asdict(origin.settings)}
        size = origin.size
    given = PictureOptions(image, mask, outpaint, vary, anew, fit, paste, reconstruct)
    given.check()
    if reconstruct and texts:
        raise InputError("`reconstruct` draws nothing, found a prompt beside it")
    check_writable(output or DEFAULT_OUTPUT)
    with _status("verifying the bundle"):
        whole = open_bundle(bundle, wait=False)
    if origin is not None:
        _refuse_other_bundle(origin, whole, from_image)
    opened = whole.at_size(size)
    manifest = opened.manifest
    classes = ClassNames.of(opened) if manifest.model.num_classes else None
    if not texts and image is not None and classes is not None:
        texts = [NONE]  # as VAR's own notebook edits
    if not texts and not reconstruct:
        raise InputError("no prompt: give one as an argument, or `prompts_file`, or `from_image`")
    if classes is None:
        hint_at_quotes(prompts)
    if labels and classes is None:
        raise InputError(f"`labels`: {bundle} draws texts and has no classes; give a PROMPT")
    if safety_model is not None and classes is not None:
        raise InputError(f"`safety_model`: reads texts, and {bundle} draws classes")

    def open_part(part: Bundle) -> Backend:
        return open_backend(part, device, threads, backend, strict, tf32)

    if reconstruct:
        show_reconstruction(opened, open_part, given, places(output, 1)[0])
        return
    with told_of(str(from_image)) if origin is not None else contextlib.nullcontext():
        texts = words_of(texts, classes)
        settings = checked_settings(manifest, texts, **options)
    source = given.source(opened, origin)
    paths = places(output, len(texts) * options["num_images"])
    for path in paths:
        check_writable(path)
    refuse_inputs(paths, opened.folder, from_image, prompts_file, image, mask)
    clear_leftovers(resolved(output or DEFAULT_OUTPUT))
    tell_replaced(paths)
    if safety_model is not None:
        _screen(texts, safety_model)
    seconds: dict[str, float] = {}
    last = start

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        add_seconds(seconds, {stage: now - last})
        last = now
        status.update("encoding the prompts" if stage == LOAD else "loading")

    with _status("loading") as status:
        pipeline = Pipeline.for_prompts(
            opened,
            texts,
            batch_size(manifest, len(paths), options["batch"]),
            open_part,
            threads,
            lap,
            settings,
        )
    options["source"], told = source, record_of(source) if source is not None else None
    drawn_with = means(pipeline.backend, tf32)
    if origin is not None:
        _tell_other_means(origin, drawn_with, from_image)
    drawn: list[Origin] = []
    files = PngWriter()
    try:
        with files:
            for result in _with_progress(pipeline, texts, options, len(paths)):
                for picture, prompt, number in zip(result.images, result.prompts, result.seeds, strict=True):
                    drawn.append(
                        Origin(
                            prompt,
                            number,
                            result.settings,
                            manifest.name,
                            opened.identity,
                            drawn_with=drawn_with,
                            picture=told,
                            size=manifest.model.image_size,
                        )
                    )
                    files.save(picture, paths[len(drawn) - 1], drawn[-1])
                add_seconds(seconds, result.seconds)
    finally:
        if 0 < len(files.written) < len(paths):
            done = f"{len(files.written)} of {len(paths)}"
            click.echo(f"{done} pictures are drawn and kept, the last of them {files.written[-1]}", err=True)
    if as_json:
        summary = _summary(pipeline, [*zip(paths, drawn, strict=True)], seconds)
        click.echo(json.dumps(summary, indent=1))
    else:
        _table(seconds, time.perf_counter() - start)
        if pipeline.backend.device == "cuda":
            click.echo("  (the GPU works while the host goes on: a stage's time is what the host waited)")
        for path in paths:
            click.echo(path)


def _status(words: str) -> Status:
    from rich.console import Console

    return Console(stderr=True).status(words)


def _screen(texts: list[str], safety_model: str) -> None:
    from hart_runtime.hart.safety import refuse_unsafe

    with _status("asking the safety model"):
        refuse_unsafe(texts, safety_model)


def _with_progress(
    pipeline: Pipeline, texts: list[str], options: dict[str, Any], pictures: int
) -> Iterator[Result]:
    """Batch after batch, with a bar for each stage and one for all pictures if there are several."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        every = progress.add_task("pictures", total=pictures, visible=pictures > 1)
        tasks: dict[str, Any] = {}

        def watch(snapshot: Snapshot) -> None:
            if snapshot.stage not in tasks:
                tasks[snapshot.stage] = progress.add_task(snapshot.stage, total=snapshot.total)
            elif snapshot.index == 0:  # the next batch
                progress.reset(tasks[snapshot.stage])
            progress.update(tasks[snapshot.stage], completed=snapshot.index + 1)

        for result in pipeline.batches(texts, watch=watch, **options):
            progress.advance(every, len(result.images))
            yield result


def _tell_other_means(origin: Origin, here: str, image: Path | None) -> None:
    if origin.drawn_with not in {"", here}:
        log.warning(
            "%s: was drawn with %s, here it is %r; pixels may differ", image, shown(origin.drawn_with), here
        )


def _refuse_beside_an_image() -> None:
    """A picture brings all that decided it: nothing that is given beside it can be kept."""
    context = click.get_current_context()
    given = [
        "a prompt" if name == "prompts" else f"`{name}`"
        for name in context.params
        if name not in HOW_IT_RUNS
        and context.params[name] not in ((), None)
        and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise InputError(
            f"`from_image` brings its own prompt, seed and settings, found {', '.join(given)} beside it"
        )


def _refuse_other_bundle(origin: Origin, bundle: Bundle, image: Path | None) -> None:
    if origin.identity != bundle.identity:
        raise InputError(
            f"{image}: was drawn with bundle {shown(origin.bundle)} ({shown(origin.identity[:12])}...), "
            f"{bundle.folder} is {shown(bundle.manifest.name)} ({bundle.identity[:12]}...)"
        )


def _summary(
    pipeline: Pipeline, saved: list[tuple[Path, Origin]], seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "images": [{"path": str(path), "prompt": o.prompt, "seed": o.seed} for path, o in saved],
        "settings": asdict(saved[0][1].settings),
        "bundle": {
            "name": pipeline.bundle.manifest.name,
            "identity": pipeline.bundle.identity,
            "precision": pipeline.bundle.manifest.precision,
        },
        "backend": pipeline.backend.name,
        "device": pipeline.backend.device,
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
    }


def _table(seconds: dict[str, float], total: float) -> None:
    """Time per stage; the parts of the scales and of the residual are summed."""
    from hart_runtime.runtime.stages import summed

    for name, value in {**summed(seconds), "total": total}.items():
        click.echo(f"  {name:<14}{value * 1000:9.1f} ms")
