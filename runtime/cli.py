"""``hart-run``: draws prompts with an exported bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart_runtime.common.console import ends_with_a_sentence
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.choices import BACKENDS

if TYPE_CHECKING:
    from rich.status import Status

    from hart_runtime.runtime.backend import Backend
    from hart_runtime.runtime.bundle import Bundle
    from hart_runtime.runtime.loop import Advance
    from hart_runtime.runtime.pipeline import Pipeline, Result
    from hart_runtime.runtime.png import Origin


PATH = click.Path(path_type=Path)
BUNDLE = "[default: the bundle's]"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--engine", required=True, type=PATH, help="Bundle folder made by hart-export.")
@click.option("--prompts-file", type=PATH, help="Text file with one prompt a line.")
@click.option("--from-image", type=PATH, help="Draw a picture of hart-run again, from what it carries.")
@click.option("--num-images", default=1, show_default=True, help="Pictures per prompt: SEED, SEED+1, ...")
@click.option("--seed", default=0, show_default=True)
@click.option("--guidance", type=float, help=f"Classifier-free guidance weight. {BUNDLE}")
@click.option("--top-k", type=int, help=f"Codes kept per token. {BUNDLE}")
@click.option("--top-p", type=float, help=f"Probability mass kept per token; 0 keeps all. {BUNDLE}")
@click.option("--smooth/--no-smooth", default=None, help=f"Mix codes instead of drawing one. {BUNDLE}")
@click.option("--residual/--no-residual", default=None, help=f"Add the continuous residual. {BUNDLE}")
@click.option("--steps", help=f"Denoising steps of the residual. {BUNDLE}")
@click.option("--batch", type=int, help="Pictures drawn at once. [default: the bundle's maximum]")
@click.option(
    "--output",
    type=PATH,
    default=Path("out.png"),
    show_default=True,
    help="PNG file; several pictures are numbered: out-0.png, out-1.png, ...",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="auto: the bundle's engines where they run, else ONNX Runtime.",
)
@click.option(
    "--strict", is_flag=True, help="Refuse graphs of which ONNX Runtime CUDA leaves work to the CPU."
)
@click.option(
    "--safety-model",
    metavar="PATH|ID",
    help="Ask this ShieldGemma about every prompt first, such as google/shieldgemma-2b. [default: none]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@ends_with_a_sentence
def main(
    prompts: tuple[str, ...],
    engine: Path,
    prompts_file: Path | None,
    from_image: Path | None,
    output: Path,
    device: str,
    backend: str,
    strict: bool,
    safety_model: str | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw each PROMPT with the bundle in ENGINE."""
    import time

    start = time.perf_counter()
    from hart_runtime.runtime.backend import open_backend
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.pipeline import Pipeline, add_seconds, batch_size, checked_settings
    from hart_runtime.runtime.png import Origin, check_writable, read_origin, save_png

    texts = [*prompts, *(read_prompts(prompts_file) if prompts_file else [])]
    origin = read_origin(from_image) if from_image else None
    if origin is not None:
        if texts:
            raise InputError("--from-image brings its own prompt, found another one beside it")
        texts = [origin.prompt]
        _refuse_overrides()
        options |= {"seed": origin.seed, **asdict(origin.settings)}
    if not texts:
        raise InputError("no prompt: give one as an argument, or --prompts-file, or --from-image")
    check_writable(output)
    with _status("verifying the bundle"):
        bundle = open_bundle(engine)
    manifest = bundle.manifest
    checked_settings(manifest, texts, **options)
    paths = _paths(output, len(texts) * options["num_images"])
    for path in paths:
        check_writable(path)
    if origin is not None:
        _refuse_other_bundle(origin, bundle, from_image)
    if safety_model is not None:
        _screen(texts, safety_model)
    seconds: dict[str, float] = {}
    last = start

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        add_seconds(seconds, {stage: now - last})
        last = now
        status.update("encoding the prompts" if stage == "load" else "loading")

    def open_part(part: Bundle) -> Backend:
        return open_backend(part, device, threads, backend, strict)

    with _status("loading") as status:
        pipeline = Pipeline.for_prompts(
            bundle, texts, batch_size(manifest, len(paths), options["batch"]), open_part, threads, lap
        )
    saved: list[tuple[Path, Origin]] = []
    try:
        for result in _with_progress(pipeline, texts, options, len(paths)):
            for image, prompt, number in zip(result.images, result.prompts, result.seeds, strict=True):
                drawn = Origin(prompt, number, result.settings, manifest.name, bundle.identity)
                save_png(image, paths[len(saved)], drawn)
                saved.append((paths[len(saved)], drawn))
            add_seconds(seconds, result.seconds)
    finally:
        if 0 < len(saved) < len(paths):
            kept = (
                f"{len(saved)} of {len(paths)} pictures are drawn and kept, the last of them {saved[-1][0]}"
            )
            click.echo(kept, err=True)
    if as_json:
        click.echo(json.dumps(_summary(pipeline, saved, seconds), indent=1))
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

        def watch(advance: Advance) -> None:
            if advance.stage not in tasks:
                tasks[advance.stage] = progress.add_task(advance.stage, total=advance.total)
            elif advance.index == 0:  # the next batch
                progress.reset(tasks[advance.stage])
            progress.update(tasks[advance.stage], completed=advance.index + 1)

        for result in pipeline.batches(texts, watch=watch, **options):
            progress.advance(every, len(result.images))
            yield result


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines are left out."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts-file {file}: cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts-file {file}: holds no prompt")
    return prompts


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def _refuse_overrides() -> None:
    context = click.get_current_context()
    fixed = ("seed", "guidance", "top_k", "top_p", "smooth", "residual", "steps", "num_images")
    given = [
        f"--{name.replace('_', '-')}"
        for name in fixed
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise InputError(f"--from-image brings its own settings, found {', '.join(given)} beside it")


def _refuse_other_bundle(origin: Origin, bundle: Bundle, image: Path | None) -> None:
    if origin.identity != bundle.identity:
        raise InputError(
            f"{image}: was drawn with bundle {origin.bundle} ({origin.identity[:12]}...), "
            f"{bundle.folder} is {bundle.manifest.name} ({bundle.identity[:12]}...)"
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
    groups: dict[str, float] = {}
    for stage, value in seconds.items():
        name = "residual" if stage.startswith("residual") else stage
        if stage.startswith("scale"):
            name = stage.split()[1]
        groups[name] = groups.get(name, 0.0) + value
    for name, value in groups.items():
        click.echo(f"  {name:<14}{value * 1000:9.1f} ms")
    click.echo(f"  {'total':<14}{total * 1000:9.1f} ms")
