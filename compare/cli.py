"""``hart-compare``: how far an exported bundle is from the reference model in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import PATH, WORD, FiniteRange, command
from hart_runtime.common.errors import InputError, one_of, parameter
from hart_runtime.common.install import require
from hart_runtime.common.precisions import FP8, FP16
from hart_runtime.common.settings import SPEEDS
from hart_runtime.compare import TORCH_FP16
from hart_runtime.runtime.backends.names import AUTO, MODULES
from hart_runtime.runtime.backends.registry import BACKENDS
from hart_runtime.runtime.options import bundle_option, device_option

if TYPE_CHECKING:
    from hart_runtime.common.settings import SamplingSettings
    from hart_runtime.compare.record import Source
    from hart_runtime.compare.reference import Reference
    from hart_runtime.compare.replay import Watch
    from hart_runtime.runtime.bundle import Bundle

FILE_WIDTH = 160
"""Columns of the table where no terminal says how wide it is: no name of it is cut."""
PROMPTS = (
    "a red circle on a white background",
    "a small blue star on a yellow background",
    "a large green ring on a black background",
    "a purple square on an orange background",
)


@command(words={"folder": "--save-reference"})
@bundle_option
@click.option(
    "--checkpoint",
    type=PATH,
    help="What the bundle was exported from. [default: the demo checkpoint if it fits]",
)
@click.option(
    "--text-encoder", type=PATH, help="Its Qwen2 folder. [default: text_encoder/ inside the checkpoint]"
)
@click.option(
    "--tokenizer", type=PATH, help="VAR's image tokenizer. [default: the one beside its transformer]"
)
@device_option
@click.option(
    "--backend",
    "backends",
    type=click.Choice([*BACKENDS, TORCH_FP16]),
    multiple=True,
    default=[AUTO],
    help="What runs the bundle; can be given several times. [default: auto]",
)
@click.option(
    "--prompts-file",
    type=PATH,
    help="Text file with one prompt (or class) a line. [default: four shapes, or four classes]",
)
@click.option("--num-prompts", type=click.IntRange(1), help="Compare the first N prompts only.")
@click.option(
    "--speed",
    type=click.Choice([*SPEEDS]),
    help="Compare drawings that leave something out, too, and the graph that does. [default: the bundle's]",
)
@click.option("--reference", type=PATH, help="Compare with a saved reference; needs no torch.")
@click.option("--save-reference", type=PATH, help="Keep what the reference did in this folder.")
@click.option(
    "--factor",
    type=FiniteRange(1),
    default=2.0,
    show_default=True,
    help="Allowed error in units of torch-fp16's.",
)
@click.option(
    "--layers",
    type=WORD,
    metavar="GRAPH",
    help="Look into this graph module by module, whatever the verdict.",
)
@click.option(
    "--output", type=PATH, default=Path("compare-report"), show_default=True, help="Folder for the report."
)
def main(
    bundle: Path,
    checkpoint: Path | None,
    text_encoder: Path | None,
    tokenizer: Path | None,
    device: str,
    backends: tuple[str, ...],
    prompts_file: Path | None,
    num_prompts: int | None,
    speed: str | None,
    reference: Path | None,
    save_reference: Path | None,
    factor: float,
    layers: str | None,
    output: Path,
) -> None:
    """Compare the bundle in BUNDLE with the reference model, graph by graph and picture by picture.

    Writes report.json and report.html to the output folder. Exit code 0: all within
    tolerance, 1: not, 2: bad input.
    """
    require("hart-compare", "compare", "polygraphy", "skimage")
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    from hart_runtime.compare.html import save_html
    from hart_runtime.compare.judge import judge
    from hart_runtime.compare.place import PAGE, REPORT, check_place
    from hart_runtime.compare.report import Limits, as_json, graph_table, layer_lines, loop_lines, save_json
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.call import checked_settings

    opened = open_bundle(bundle)
    if layers is not None:
        one_of("layers", layers, opened.manifest.graphs)
    check_place(output)
    with _progress() as watch:
        needed = reference is None or layers is not None
        source = _source(checkpoint, text_encoder, tokenizer, opened, needed)
        prompts = _prompts(opened, prompts_file, num_prompts, speed, reference)
        settings = checked_settings(opened.manifest, prompts, speed=speed)
        ruler = _reference(
            reference, save_reference, source, opened, prompts, settings, device, backends, watch
        )
        limits = Limits(factor=factor)
        runs = [judge(name, opened, ruler, source, device, layers, limits, watch) for name in backends]
    output.mkdir(parents=True, exist_ok=True)
    report = as_json(ruler, runs, limits)
    save_json(report, output / REPORT)
    save_html(ruler, runs, output / PAGE)
    for run in runs:
        _print(graph_table(run))
        for line in loop_lines(run) + (layer_lines(run.layers) if run.layers else []):
            click.echo(line)
        if failure := run.first_failure:
            click.echo(f"first failure: graph {failure.graph} at {failure.call}, output {failure.output}")
    click.echo(f"{'within' if report['passed'] else 'NOT within'} tolerance; see {output / PAGE}")
    sys.exit(0 if report["passed"] else 1)


def _source(
    given: Path | None, text_encoder: Path | None, tokenizer: Path | None, bundle: Bundle, needed: bool
) -> Source | None:
    """The bundle's checkpoint, verified; None where none is needed and none was given."""
    if given is None and not needed:
        return None
    require("the reference model", "export", "torch", "safetensors")
    from hart_runtime.compare.record import Source
    from hart_runtime.hart.demo import DEMOS
    from hart_runtime.hart.find import finder
    from hart_runtime.runtime.origin import exported_from

    looked_for = finder(bundle.manifest.checkpoint, tokenizer)
    found = exported_from(bundle, given, DEMOS.values(), looked_for, text_encoder)
    return Source.of(found, bundle.manifest)


def _reference(
    saved: Path | None,
    save_to: Path | None,
    source: Source | None,
    bundle: Bundle,
    prompts: list[str],
    settings: SamplingSettings,
    device: str,
    backends: tuple[str, ...],
    watch: Watch,
) -> Reference:
    """Load the ruler, or make it; with the errors of torch in fp16 where they are the measure."""
    from dataclasses import replace

    from hart_runtime.compare.reference import load_reference
    from hart_runtime.compare.reference import save_reference as save

    if saved is not None:
        ruler = load_reference(saved, bundle.manifest)
    else:
        from hart_runtime.compare.record import capture_prompts, torch_device
        from hart_runtime.runtime.tensorrt.manifest import largest_batch

        assert source is not None
        watch("reference in float32")
        # Recorded batches are run as they are, so they may not be larger than what engines hold.
        engines = {AUTO, *MODULES} & set(backends)
        at_once = largest_batch(bundle) if engines else bundle.manifest.max_batch
        ruler = capture_prompts(source, bundle, prompts, torch_device(device), at_once, settings)
    reduced = bundle.manifest.precision in (FP16, FP8) or TORCH_FP16 in backends or save_to is not None
    if reduced and ruler.half_errors is None:
        if source is None:
            raise InputError(
                f"{parameter('reference', saved)}: holds no errors of torch in fp16, which a "
                f"{bundle.manifest.precision} bundle is measured against; give `checkpoint`, or save the "
                f"reference again"
            )
        from hart_runtime.compare.record import torch_device
        from hart_runtime.compare.replay import half_errors
        from hart_runtime.compare.torch_backend import TorchHalfBackend

        half = TorchHalfBackend(source, ruler.patch_nums, torch_device(device))
        errors = half_errors(half, bundle.manifest, ruler, lambda name: watch(f"torch in fp16: {name}"))
        ruler = replace(ruler, half_errors=errors)
    if save_to is not None:
        save(ruler, bundle.manifest, save_to)
    return ruler


def _prompts(
    bundle: Bundle, file: Path | None, count: int | None, speed: str | None, reference: Path | None
) -> list[str]:
    if reference is not None and (file is not None or count is not None):
        raise InputError(
            "`reference` brings its own prompts, found `prompts_file` or `num_prompts` beside it"
        )
    if reference is not None and speed is not None:
        raise InputError("`reference` brings its own settings, found `speed` beside it")
    from hart_runtime.runtime.call import words_of
    from hart_runtime.runtime.class_names import ClassNames
    from hart_runtime.runtime.prompts import read_prompts

    classes = bundle.manifest.model.num_classes
    default = [str(k * classes // len(PROMPTS)) for k in range(len(PROMPTS))] if classes else list(PROMPTS)
    prompts = read_prompts(file) if file else default
    prompts = words_of(prompts, ClassNames.of(bundle) if classes else None)
    if count is not None and count > len(prompts):
        raise InputError(
            f"{parameter('num_prompts', count)}: only {len(prompts)} prompts are there; "
            f"give more in `prompts_file`"
        )
    return prompts[:count]


@contextmanager
def _progress() -> Iterator[Watch]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("comparing") as status:
        yield lambda what: status.update(f"comparing: {what}")


def _print(table: object) -> None:
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table)
