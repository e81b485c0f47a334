"""``hart-export``: checkpoint to bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart_runtime.common.checkpoint import LLM
from hart_runtime.common.console import PATH, WORD, command, in_options
from hart_runtime.common.errors import InputError, parameter, shown
from hart_runtime.common.precisions import DEFAULT_PRECISION, FLOAT8_CAPABILITY, FP8, PRECISIONS
from hart_runtime.common.settings import DEFAULT_MAX_BATCH, MOST_MAX_BATCH
from hart_runtime.hart.demo import DEMOS
from hart_runtime.runtime.backends.names import AUTO, MODULES
from hart_runtime.runtime.backends.registry import BACKENDS

if TYPE_CHECKING:
    from hart_runtime.export.bundle import Progress
    from hart_runtime.export.request import Request
    from hart_runtime.runtime.manifest import Manifest

ENGINES, DEMO, TEXT = Path("engines"), "demo", "text"


@command(words={"size": "--size"})
@click.argument("checkpoint", required=False, type=WORD)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default=DEFAULT_PRECISION,
    show_default=True,
    help="Type of the matrix products; norms, softmax, angles and sampling stay float32. int8: CPU only. "
    f"fp8: engines for GPUs of compute capability {FLOAT8_CAPABILITY} and newer.",
)
@click.option(
    "--text-encoder",
    type=WORD,
    metavar="PATH|ID",
    help="Qwen2 text encoder, a folder or a hub id. [default: text_encoder/ inside the checkpoint]",
)
@click.option(
    "--system-prompt",
    type=WORD,
    metavar="FILE|none",
    help="What the model was trained to see before every prompt: a text file, or Python source that sets "
    "llm_system_prompt. [default: the published one, unless the text encoder's config.json declines]",
)
@click.option(
    "--revision",
    type=WORD,
    help="Branch, tag or commit of CHECKPOINT on the hub; elsewhere write OWNER/NAME@REVISION.",
)
@click.option(
    "--file",
    type=WORD,
    help="Which file of CHECKPOINT it is, where there are several: var_d16.pth of FoundationVision/var, "
    "mar_base/checkpoint-last.pth of MAR's.",
)
@click.option(
    "--tokenizer",
    type=PATH,
    help="VAR's or MAR's image tokenizer. [default: vae_ch160v4096z32.pth beside the transformer, or "
    "kl16.ckpt beside it or one folder above]",
)
@click.option(
    "--heads",
    type=WORD,
    help="Of a MAR whose width is no published one: how many heads, or those of encoder and decoder (12,16).",
)
@click.option(
    "--class-names",
    type=PATH,
    help="Names of the classes, one a line. [default: classes.txt beside the checkpoint, or ImageNet's, if "
    "there are 1,000]",
)
@click.option(
    "--demo",
    type=click.Choice([*DEMOS]),
    help="Which checkpoint of the package is exported without CHECKPOINT, by what it draws. [default: text]",
)
@click.option("--output", type=PATH, help="Bundle folder. [default: engines/NAME]")
@click.option(
    "--max-batch",
    type=click.IntRange(1, MOST_MAX_BATCH),
    default=DEFAULT_MAX_BATCH,
    show_default=True,
    help="Most images drawn at once.",
)
@click.option(
    "--size",
    "sizes",
    type=int,
    multiple=True,
    help="Pixels along a side, for smaller pictures by the same weights; several times for several, of which "
    "the first is drawn unless another is asked for. [default: the checkpoint's]",
)
@click.option(
    "--ema/--no-ema",
    default=None,
    help="Averaged weights, in a file such as ema_model.bin or below a key such as ema, or the others. "
    "[default: averaged ones if there are any]",
)
@click.option(
    "--encoder/--no-encoder",
    default=True,
    help="Whether the bundle takes pictures, too, to change a part of them or to vary them. [default: yes]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=AUTO,
    show_default=True,
    help="What the bundle is for. TensorRT's get engines after the graphs, the others need none; auto: "
    "engines of what is installed. More with hart-build.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Only print what would be made and what does not fit here.")
@click.option(
    "--check", is_flag=True, help="Only tell what CHECKPOINT is and whether it fits, by its headers alone."
)
@click.option("--report", type=PATH, help="File for what --check finds, as JSON without paths.")
def main(
    checkpoint: str | None,
    precision: str,
    text_encoder: str | None,
    system_prompt: str | None,
    revision: str | None,
    file: str | None,
    tokenizer: Path | None,
    heads: str | None,
    class_names: Path | None,
    demo: str | None,
    output: Path | None,
    max_batch: int,
    sizes: tuple[int, ...],
    ema: bool | None,
    encoder: bool,
    backend: str,
    force: bool,
    dry_run: bool,
    check: bool,
    report: Path | None,
) -> None:
    """Turn CHECKPOINT, a folder or hub id in the published layout, or VAR's or MAR's file, into a bundle.

    Without CHECKPOINT, a demo checkpoint that comes with the package is exported. What is there
    already, of the same checkpoint with the same options, is kept, and only missing engines are built.
    """
    from hart_runtime.common.install import require

    require("hart-export", "export", "torch", "onnx", "onnxscript", "huggingface_hub", "safetensors")
    from hart_runtime.export.hub import CONFIGURATIONS, WANTED, resolve
    from hart_runtime.export.request import Request, check_place, check_replaceable
    from hart_runtime.export.system_prompt import read_system_prompt
    from hart_runtime.hart.find import find
    from hart_runtime.runtime.tensorrt.package import import_package

    for name, value in (("revision", revision), ("file", file)):
        if value is not None and checkpoint is None:
            raise InputError(f"{parameter(name, value)}: the demo checkpoint has none; name a CHECKPOINT")
    if demo is not None and checkpoint is not None:
        raise InputError(f"{parameter('demo', demo)}: found a CHECKPOINT beside it; give one of them")
    if report is not None and not check:
        raise InputError(f"{parameter('report', report)}: is of `check`, which is not given")
    # What can be refused is refused before a download, and by configurations before weights are downloaded.
    wants_engines = PRECISIONS[precision].engines
    if backend in MODULES:
        if not wants_engines:
            able = " or ".join(name for name, kind in PRECISIONS.items() if kind.engines)
            asked = parameter("precision", precision)
            raise InputError(f"{parameter('backend', backend)}: engines are {able}, found {asked}")
        import_package(backend)
    if output is not None and not (dry_run or check):
        check_replaceable(output, force)
    if system_prompt is not None:
        read_system_prompt(system_prompt, wanted=False)

    def requested(place: Path, text: Path | None) -> Request:
        found = find(place, text, ema, tokenizer, heads)
        return Request(found, precision, max_batch, system_prompt, class_names, sizes=sizes, encoder=encoder)

    if check:
        _check(checkpoint or str(DEMOS[demo or TEXT]), revision, file, text_encoder, requested, report)
        return

    def places(patterns: list[str]) -> tuple[Path, Path | None]:
        source = DEMOS[demo or TEXT] if checkpoint is None else resolve(checkpoint, revision, patterns, file)
        return source, None if text_encoder is None else resolve(text_encoder, patterns=patterns)

    source, text = places(CONFIGURATIONS)
    if not dry_run and not any(source.rglob("config.json")):
        source, text = places(WANTED)  # VAR's files tell of themselves
    request = requested(source, text)
    ours = DEMO if demo in (None, TEXT) else f"{DEMO}-{demo}"
    target = output or ENGINES / (ours if checkpoint is None else request.checkpoint.name)
    request.check(weights=False)
    if dry_run:
        from hart_runtime.export.dry_run import forecast, show

        show(forecast(request), precision, target)
        _tell_of_place(request, target, force)
        return
    check_replaceable(target, force)
    request = requested(*places(WANTED))  # a branch of the hub may have moved on meanwhile
    request.check()
    if request.checkpoint.text_encoder is None and not request.model.num_classes:
        click.echo(
            "note: there is no text encoder, so this bundle will draw from text features only; "
            "give --text-encoder to draw from prompts",
            err=True,
        )
    if check_place(request, target, force):
        click.echo(f"{target}: is there already, from the same checkpoint with the same options")
    else:
        _tell_of_engines(target)
        _export(request, target, force)
    if wants_engines:
        _build(target, backend)


def _check(
    source: str,
    revision: str | None,
    file: str | None,
    text_encoder: str | None,
    requested: Callable[[Path, Path | None], Request],
    report: Path | None,
) -> None:
    """Tell what headers tell; raises InputError where something would keep an export from being made."""
    from hart_runtime.common.files import check_output
    from hart_runtime.export.check import check, show, write
    from hart_runtime.export.headers import headers_of

    if report is not None:
        check_output(report)
    encoder = headers_of(text_encoder, None) if text_encoder else nullcontext()
    with headers_of(source, revision) as own, encoder as text:
        request = requested(own.folder / (file or ""), text.folder if text else None)
        found = check(request, {**own.pickled, **(text.pickled if text else {})})
    show(found)
    if report is not None:
        write(found, report)
        click.echo(f"{report}: the same as JSON, without paths: it can be shown to others")
    if found.problems:
        raise InputError(f"{source}: would not be exported as it is, for {len(found.problems)} reasons above")


def _tell_of_place(request: Request, target: Path, force: bool) -> None:
    """What an export would say of what is there already, as far as it is known without weights."""
    from hart_runtime.export.request import check_place

    try:
        if all(network.has_weights for network in request.checkpoint.networks.values()):
            if check_place(request, target, force):
                click.echo(f"{target}: is there already, from the same checkpoint with the same options")
        elif target.exists() and not force:
            click.echo(f"{target}: exists already, would be replaced with --force alone")
    except InputError as error:
        click.echo(f"would be refused: {in_options(str(error))}")


def _tell_of_engines(target: Path) -> None:
    """Those of a bundle that is replaced go with it: they were built from its graphs."""
    from hart_runtime.runtime.owned import engine_folders

    if engines := engine_folders(target):
        click.echo(f"note: {target}: its engines are removed with it: {', '.join(engines)}", err=True)


def _export(request: Request, target: Path, force: bool) -> None:
    start = time.monotonic()
    with _progress() as progress:
        from hart_runtime.export.bundle import export_bundle

        manifest = export_bundle(request, target, force, progress)
    size = sum(file.size for file in manifest.files.values())
    click.echo(
        f"{target}: {len(manifest.graphs)} graphs, {request.precision}, {size / 1e6:.1f} MB, "
        f"{time.monotonic() - start:.1f} s"
    )
    if manifest.precision == FP8:
        _tell_rounded(manifest)
    _tell_weights(request, manifest)
    if count := request.model.num_classes:
        click.echo(f"classes: {count}, {'with names' if request.names else 'by their numbers alone'}")
    if request.checkpoint.text_encoder is not None:
        _tell_system_prompt(manifest.checkpoint.get("system_prompt"))


def _tell_rounded(manifest: Manifest) -> None:
    """Which products calibration left in half, the most sensitive first."""
    ranked = sorted(manifest.in_half.items(), key=lambda item: -item[1])
    kept = ", ".join(f"{name} ({error:.1%})" for name, error in ranked)
    click.echo(
        f"fp8: products of attention and MLP; in half, since rounding would do too much: {kept or 'none'}"
    )


def _tell_weights(request: Request, manifest: Manifest) -> None:
    """Which files went in, and which of the same folders did not: pictures alone do not show it."""
    said = []
    for name, network in request.checkpoint.networks.items():
        first, *more = network.names
        place = "" if network.file else f"{name}/"
        said.append(f"{place}{first}{f' and {len(more)} more' if more else ''}")
        others = list(network.weights.passed_over)
        if name == LLM:
            chosen, *unused = manifest.sets
            others += [f"what is below {shown(key)}" for key in unused]
            said[-1] += f" below {shown(chosen)}" if chosen else ""
            said[-1] += " (averaged)" if manifest.averaged else ""
        if others:
            said[-1] += f" (not {', '.join(others)})"
    click.echo(f"weights: {', '.join(said)}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, a line a graph elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("exporting {task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("checkpoint", total=None)

        def told(name: str, done: int, total: int) -> None:
            bars.update(task, description=name, completed=done, total=total)
            if not console.is_terminal:
                click.echo(f"exporting {name} ({done + 1} of {total})", err=True)

        yield told


def _tell_system_prompt(found: dict[str, Any] | None) -> None:
    """Which system prompt is inside: another than the model's own spoils pictures silently."""
    from hart_runtime.export.system_prompt import SHA256

    if found is None:
        click.echo("system prompt: none")
        return
    published = found["sha256"] == SHA256
    kind = "the published one" if published else f"sha256 {found['sha256']}"
    click.echo(f"system prompt: {kind}, {len(found['tokens'])} tokens")
    if not published:
        click.echo(
            f"warning: the published system prompt has sha256 {SHA256}; the published weights need that one",
            err=True,
        )


def _build(target: Path, backend: str) -> None:
    """Build engines with the package asked for, or with what there is."""
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.memory.gpu import present_gpu
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.cli import choose_package, report
    from hart_runtime.runtime.tensorrt.float8 import lacking
    from hart_runtime.runtime.tensorrt.manifest import options_of
    from hart_runtime.runtime.tensorrt.package import how_to_install

    if backend not in (AUTO, *MODULES):
        return
    package = choose_package(backend)
    bundle = open_bundle(target)
    if backend == AUTO and (reason := lacking(bundle.manifest, present_gpu())):
        click.echo(f"note: no engines were built: {in_options(reason)}", err=True)
    elif package is not None:
        # Those that are there with other options than the default's were built by somebody who wants them.
        for options in options_of(bundle, package) or [BuildOptions()]:
            report(bundle, package, options)
    else:
        click.echo(
            "note: no engines were built, neither TensorRT (with a GPU) nor TensorRT-RTX is here; to have "
            f"them: {how_to_install()}, then hart-build --engine {target}",
            err=True,
        )
