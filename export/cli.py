"""``hart-export``: checkpoint to bundle."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from hart_runtime.common.console import ends_with_a_sentence
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.bundle import INT8
from hart_runtime.runtime.tensorrt.package import MODULES


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", required=False)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp16",
    show_default=True,
    help="Type of the matrix products; norms, softmax, angles and sampling stay float32. int8: CPU only.",
)
@click.option(
    "--text-encoder",
    metavar="PATH|ID",
    help="Qwen2 text encoder, a folder or a hub id. [default: text_encoder/ inside the checkpoint]",
)
@click.option(
    "--system-prompt",
    metavar="FILE|none",
    help="What the model was trained to see before every prompt: a text file, or Python source that sets "
    "llm_system_prompt. [default: the published one, unless the text encoder's config.json declines]",
)
@click.option(
    "--revision", help="Branch, tag or commit of CHECKPOINT on the hub; elsewhere write OWNER/NAME@REVISION."
)
@click.option("--output", type=click.Path(path_type=Path), help="Bundle folder. [default: engines/NAME]")
@click.option(
    "--max-batch", type=click.IntRange(1, 64), default=8, show_default=True, help="Most images drawn at once."
)
@click.option(
    "--ema/--no-ema", default=True, show_default=True, help="Prefer the averaged weights, ema_model.bin."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnx", *MODULES]),
    default="auto",
    show_default=True,
    help="Engines to build after the graphs; onnx: none; auto: what is installed. More with hart-build.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Only print what would be made and what does not fit here.")
@ends_with_a_sentence
def main(
    checkpoint: str | None,
    precision: str,
    text_encoder: str | None,
    system_prompt: str | None,
    revision: str | None,
    output: Path | None,
    max_batch: int,
    ema: bool,
    backend: str,
    force: bool,
    dry_run: bool,
) -> None:
    """Turn CHECKPOINT, a folder or a hub id in the published layout, into a bundle.

    Without CHECKPOINT, the demo checkpoint that comes with the package is exported.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hart_runtime.export.hub import CONFIGURATIONS, WANTED, resolve
    from hart_runtime.hart.demo import DEMO_CHECKPOINT
    from hart_runtime.runtime.tensorrt.package import import_package

    if revision is not None and checkpoint is None:
        raise InputError(f"--revision {revision}: the demo checkpoint has none; name a CHECKPOINT")
    patterns = CONFIGURATIONS if dry_run else WANTED
    source = resolve(checkpoint, revision, patterns) if checkpoint else DEMO_CHECKPOINT
    encoder = resolve(text_encoder, patterns=patterns) if text_encoder else None
    target = output or Path("engines") / (_name(checkpoint) if checkpoint else "demo")
    if dry_run:
        _need_torch()
        from hart_runtime.export.dry_run import forecast, show

        show(forecast(source, encoder, max_batch, ema), precision, target)
        return
    if backend in MODULES:
        if precision == INT8:
            raise InputError(f"--backend {backend}: engines are fp16 or fp32, found --precision {INT8}")
        import_package(backend)  # missing packages are told of before the work, not after
    start = time.monotonic()
    console = Console(stderr=True)
    columns = (TextColumn("exporting {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("checkpoint", total=None)
        _need_torch()
        from hart_runtime.export.bundle import export_bundle

        manifest = export_bundle(
            source,
            target,
            precision,
            text_encoder=encoder,
            system_prompt=system_prompt,
            max_batch=max_batch,
            ema=ema,
            force=force,
            progress=lambda name, done, total: progress.update(
                task, description=name, completed=done, total=total
            ),
        )
    size = sum(file.size for file in manifest.files.values())
    click.echo(
        f"{target}: {len(manifest.graphs)} graphs, {precision}, {size / 1e6:.1f} MB, "
        f"{time.monotonic() - start:.1f} s"
    )
    if "text_encoder" not in manifest.graphs:
        click.echo(
            "note: no text encoder was found, so this bundle draws from text features only; "
            "give --text-encoder to draw from prompts",
            err=True,
        )
    else:
        _tell_system_prompt(manifest.checkpoint["system_prompt"])
    if precision != INT8:
        _build(target, backend)


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


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise InputError("hart-export needs torch; install it with: pip install 'hart-runtime[export]'")


def _build(target: Path, backend: str) -> None:
    """Build engines with the package asked for, or with what there is."""
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.tensorrt.build import BuildOptions
    from hart_runtime.runtime.tensorrt.cli import choose_package, report
    from hart_runtime.runtime.tensorrt.package import INSTALL

    if backend == "onnx":
        return
    package = choose_package(backend)
    if package is not None:
        report(open_bundle(target), package, BuildOptions())
    else:
        click.echo(
            "note: no engines were built, neither TensorRT (with a GPU) nor TensorRT-RTX is here; to have "
            f"them: {' or '.join(INSTALL.values())}, then hart-build --engine {target}",
            err=True,
        )


def _name(checkpoint: str) -> str:
    """engines/NAME for a folder or hub id; ``x/llm`` is named after ``x``."""
    from hart_runtime.export.hub import name_of

    path = Path(checkpoint.rstrip("/"))
    folder = path.resolve().parent if path.name == "llm" else path
    return name_of(folder).rpartition("/")[2].partition("@")[0]
