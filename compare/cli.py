"""``hart-compare``: how far an exported bundle is from the reference model in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import ends_with_a_sentence
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.choices import BACKENDS

if TYPE_CHECKING:
    from hart_runtime.compare.capture import Checkpoint
    from hart_runtime.compare.reference import Reference
    from hart_runtime.compare.replay import Watch
    from hart_runtime.runtime.bundle import Bundle

PATH = click.Path(path_type=Path)
PROMPTS = (
    "a red circle on a white background",
    "a small blue star on a yellow background",
    "a large green ring on a black background",
    "a purple square on an orange background",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--engine", required=True, type=PATH, help="Bundle folder made by hart-export.")
@click.option(
    "--checkpoint",
    type=PATH,
    help="What the bundle was exported from. [default: the demo checkpoint if it fits]",
)
@click.option(
    "--text-encoder", type=PATH, help="Its Qwen2 folder. [default: text_encoder/ inside the checkpoint]"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--backend",
    "backends",
    type=click.Choice([*BACKENDS, "torch-fp16"]),
    multiple=True,
    default=["auto"],
    help="What runs the bundle; can be given several times. [default: auto]",
)
@click.option("--prompts-file", type=PATH, help="Text file with one prompt a line. [default: four shapes]")
@click.option("--num-prompts", type=click.IntRange(1), help="Compare the first N prompts only.")
@click.option("--reference", type=PATH, help="Compare with a saved reference; needs no torch.")
@click.option("--save-reference", type=PATH, help="Keep what the reference did in this folder.")
@click.option(
    "--factor",
    type=click.FloatRange(1),
    default=2.0,
    show_default=True,
    help="Allowed error in units of torch-fp16's.",
)
@click.option(
    "--layers", metavar="GRAPH", help="Look into this graph module by module, whatever the verdict."
)
@click.option(
    "--output", type=PATH, default=Path("compare-report"), show_default=True, help="Folder for the report."
)
@ends_with_a_sentence
def main(
    engine: Path,
    checkpoint: Path | None,
    text_encoder: Path | None,
    device: str,
    backends: tuple[str, ...],
    prompts_file: Path | None,
    num_prompts: int | None,
    reference: Path | None,
    save_reference: Path | None,
    factor: float,
    layers: str | None,
    output: Path,
) -> None:
    """Compare the bundle in ENGINE with the reference model, graph by graph and picture by picture.

    Writes report.json and report.html to the output folder. Exit code 0: all within
    tolerance, 1: not, 2: bad input.
    """
    _require("polygraphy", "hart-compare", "compare")
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    from hart_runtime.compare.engine import measure
    from hart_runtime.compare.html import save_html
    from hart_runtime.compare.report import Limits, as_json, graph_table, layer_lines, loop_lines, save_json
    from hart_runtime.runtime.bundle import open_bundle

    bundle = open_bundle(engine)
    if layers is not None and layers not in bundle.manifest.graphs:
        raise InputError(f"--layers {layers}: expected one of {', '.join(bundle.manifest.graphs)}")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: expected a folder, found a file")
    with _progress() as watch:
        source = _checkpoint(checkpoint, text_encoder, bundle, reference is None or layers is not None)
        prompts = _prompts(prompts_file, num_prompts, reference)
        ruler = _reference(reference, save_reference, source, bundle, prompts, device, backends, watch)
        limits = Limits(factor=factor)
        runs = [measure(name, bundle, ruler, source, device, layers, limits, watch) for name in backends]
    output.mkdir(parents=True, exist_ok=True)
    report = as_json(ruler, runs, limits)
    save_json(report, output / "report.json")
    save_html(ruler, runs, output / "report.html")
    for run in runs:
        _print(graph_table(run))
        for line in loop_lines(run) + (layer_lines(run.layers) if run.layers else []):
            click.echo(line)
        if failure := run.first_failure:
            click.echo(f"first failure: graph {failure.graph} at {failure.call}, output {failure.output}")
    click.echo(f"{'within' if report['passed'] else 'NOT within'} tolerance; see {output / 'report.html'}")
    sys.exit(0 if report["passed"] else 1)


def _checkpoint(
    given: Path | None, text_encoder: Path | None, bundle: Bundle, needed: bool
) -> Checkpoint | None:
    """The bundle's checkpoint, verified; None where none is needed and none was given."""
    if given is None and not needed:
        return None
    from hart_runtime.hart.demo import DEMO_CHECKPOINT

    _require("torch", "the reference model", "export")
    from hart_runtime.compare.capture import Checkpoint
    from hart_runtime.compare.reference import check_fits

    source = Checkpoint(given or DEMO_CHECKPOINT, text_encoder, bundle.manifest)
    try:
        check_fits(source.weights, bundle.manifest, f"--checkpoint {source.root}")
    except InputError:
        if given is not None:
            raise
        name = bundle.manifest.checkpoint["source"]
        raise InputError(
            f"{bundle.folder}: was exported from {name}, which is not the demo checkpoint; "
            f"give its folder as --checkpoint"
        ) from None
    return source


def _reference(
    saved: Path | None,
    save_to: Path | None,
    source: Checkpoint | None,
    bundle: Bundle,
    prompts: list[str],
    device: str,
    backends: tuple[str, ...],
    watch: Watch,
) -> Reference:
    """Load the ruler, or make it; with the errors of torch in fp16 where they are the measure."""
    from dataclasses import replace

    from hart_runtime.compare.reference import check_fits, load_reference
    from hart_runtime.compare.reference import save_reference as save

    if saved is not None:
        ruler = load_reference(saved)
        check_fits(ruler.weights, bundle.manifest, f"--reference {saved}")
        if ruler.patch_nums != bundle.manifest.model.patch_nums:
            raise InputError(
                f"--reference {saved}: was recorded with scales {list(ruler.patch_nums)}, "
                f"{bundle.folder} has {list(bundle.manifest.model.patch_nums)}"
            )
    else:
        from hart_runtime.compare.capture import capture_prompts, torch_device

        assert source is not None
        watch("reference in float32")
        ruler = capture_prompts(source, bundle, prompts, torch_device(device))
    reduced = bundle.manifest.precision == "fp16" or "torch-fp16" in backends or save_to is not None
    if reduced and ruler.half_errors is None:
        if source is None:
            raise InputError(
                f"--reference {saved}: holds no errors of torch in fp16, which a {bundle.manifest.precision} "
                f"bundle is measured against; give --checkpoint, or save the reference again"
            )
        from hart_runtime.compare.capture import torch_device
        from hart_runtime.compare.replay import half_errors
        from hart_runtime.compare.torch_backend import TorchHalfBackend

        half = TorchHalfBackend(source, ruler.patch_nums, torch_device(device))
        errors = half_errors(half, bundle.manifest, ruler, lambda name: watch(f"torch in fp16: {name}"))
        ruler = replace(ruler, half_errors=errors)
    if save_to is not None:
        save(ruler, bundle.manifest, save_to)
    return ruler


def _prompts(file: Path | None, count: int | None, reference: Path | None) -> list[str]:
    if reference is not None and (file is not None or count is not None):
        raise InputError(
            "--reference brings its own prompts, found --prompts-file or --num-prompts beside it"
        )
    from hart_runtime.runtime.cli import read_prompts

    prompts = read_prompts(file) if file else list(PROMPTS)
    if count is not None and count > len(prompts):
        raise InputError(
            f"--num-prompts {count}: only {len(prompts)} prompts are there; give more in --prompts-file"
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
    Console(width=max(console.width, 110)).print(table)


def _require(package: str, purpose: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise InputError(f"{purpose} needs {package}; install it with: pip install 'hart-runtime[{extra}]'")
