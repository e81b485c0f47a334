"""``hart-build``: engines from a bundle. Needs no torch."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import WORD, FiniteRange, command, in_options
from hart_runtime.common.errors import InputError, parameter, shown
from hart_runtime.common.precisions import FP16
from hart_runtime.runtime.backends.names import AUTO, MODULES
from hart_runtime.runtime.options import bundle_option

if TYPE_CHECKING:
    from hart_runtime.runtime.bundle import Bundle
    from hart_runtime.runtime.memory.gpu import Gpu
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.manifest import EngineManifest, EngineSpec
    from hart_runtime.runtime.tensorrt.package import Package

log = logging.getLogger(__name__)


@command(words={"batches": "--batch", "compute_capabilities": "--compute-capability"})
@bundle_option
@click.option(
    "--backend",
    type=click.Choice([AUTO, *MODULES]),
    default=AUTO,
    show_default=True,
    help="auto: whichever is installed.",
)
@click.option("--batch", default="1", show_default=True, help="Pictures drawn at once: 4, or 1..4.")
@click.option(
    "--scales",
    type=click.Choice(["static", "dynamic"]),
    default="static",
    show_default=True,
    help="static: a profile per scale, fastest to run; dynamic: one for all, faster to build and smaller.",
)
@click.option(
    "--compute-capability",
    type=WORD,
    help="TensorRT-RTX: GPUs to build for, such as 8.6,8.9,12.0. [default: this GPU, or Ampere and newer, in "
    "fp8 8.9 and 12.0]",
)
@click.option("--workspace", type=FiniteRange(0.001, 1e6), help="Most scratch memory, in GB.")
@click.option(
    "--top-k", help="Codes kept per token that may be asked for: 100, or 1..1000. [default: the bundle's]"
)
@click.option(
    "--keep",
    help="Also build what leaves tokens out: shares of those that take part, such as 0.5,0.25.",
)
@click.option(
    "--tf32", is_flag=True, help="Let float32 products round what they multiply: faster, not as exact."
)
@click.option("--force", is_flag=True, help="Build what is current, too.")
@click.option("--dry-run", is_flag=True, help="Only print what would be built and why.")
def main(
    bundle: Path,
    backend: str,
    batch: str,
    scales: str,
    compute_capability: str | None,
    workspace: float | None,
    top_k: str | None,
    keep: str | None,
    tf32: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Build the engines of the bundle in BUNDLE, those that are not there or not current.

    An engine is a program for the GPU: build engines yourself, or take them only from someone
    whose programs you would run.
    """
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.tensorrt.build import parse_range
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.package import absent_package, how_to_install

    options = BuildOptions(
        batches=parse_range("`batches`", batch),
        per_scale=scales == "static",
        compute_capabilities=parse_capabilities(compute_capability),
        workspace=workspace,
        top_k=None if top_k is None else parse_range("`top_k`", top_k),
        tf32=tf32,
        keep=keep,
    )
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if not manifest.kind.engines:
        raise InputError(
            f"{opened.folder}: is an {manifest.precision} bundle, which only the CPU runs; "
            f"export the checkpoint with {parameter('precision', FP16)} for engines"
        )
    if dry_run:
        foretell(opened, _package_or_none(backend) or absent_package(backend), options, force)
        return
    package = choose_package(backend)
    if package is None:
        raise InputError(f"neither TensorRT (with a GPU) nor TensorRT-RTX is here; {how_to_install()}")
    report(opened, package, options, force)


def choose_package(backend: str) -> Package | None:
    """The package asked for, or with "auto" the first that can build here, if there is one."""
    from hart_runtime.runtime.memory.gpu import present_gpu
    from hart_runtime.runtime.tensorrt.package import available_packages, import_package

    if backend != AUTO:
        return import_package(backend)
    gpu = present_gpu() is not None
    return next((p for p in available_packages() if gpu or p.ahead_of_time), None)


def _package_or_none(backend: str) -> Package | None:
    """As :func:`choose_package`, for who can do without it."""
    try:
        return choose_package(backend)
    except InputError as error:
        log.warning("%s", error)
        return None


def foretell(bundle: Bundle, package: Package, options: BuildOptions, force: bool = False) -> None:
    """Say which engines would be built, from which files, and why, and what a picture will need."""
    from hart_runtime.runtime.memory.gpu import present_gpu
    from hart_runtime.runtime.tensorrt.build import plan_engines
    from hart_runtime.runtime.tensorrt.package import graph_read

    gpu = present_gpu()
    folder, jobs = plan_engines(bundle, package, options, gpu, force)
    place = bundle.folder if package.api is None else folder
    click.echo(f"{place}, with {package.name} {package.version} on {gpu or 'no GPU'}:")
    for job in jobs:
        file = graph_read(package, bundle.manifest.graphs[job.name])
        what = in_options(f"build: {job.reason}") if job.reason else "current"
        click.echo(f"  {job.name:<20}{len(job.profiles):3} profiles  from {file:<28} {what}")
    _tell_memory(bundle, options, None)


def report(bundle: Bundle, package: Package, options: BuildOptions, force: bool = False) -> None:
    """Build and tell: progress on stderr, then a line per engine on stdout."""
    from hart_runtime.runtime.memory.gpu import present_gpu

    gpu = present_gpu()
    if gpu is None and not package.ahead_of_time:
        raise InputError(
            f"{parameter('backend', package.name)}: it builds on the GPU it builds for, and found none"
        )
    start = time.perf_counter()
    folder, manifest, built = _with_progress(bundle, package, options, gpu, force)
    for name in built:
        click.echo(_line(name, manifest.engines[name]))
    _warn_of_attention(bundle, manifest)
    size = sum(spec.file.size for spec in manifest.engines.values())
    done = f"{len(built)} engines built" if built else "every engine is current"
    click.echo(f"{folder}: {done}, {size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s")
    _tell_memory(bundle, options, manifest)


def _with_progress(
    bundle: Bundle, package: Package, options: BuildOptions, gpu: Gpu | None, force: bool
) -> tuple[Path, EngineManifest, list[str]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hart_runtime.runtime.tensorrt.build import build_engines
    from hart_runtime.runtime.tensorrt.builder import Phase

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = progress.add_task("engines")

        def watch(name: str, number: int, count: int) -> Phase:
            progress.update(total, completed=number, total=count)
            task = progress.add_task(name)

            def step(phase: str, done: int, of: int) -> None:
                progress.update(task, description=f"{name}: {phase}", completed=done, total=of)

            return step

        return build_engines(bundle, package, options, gpu, force, watch)


def _line(name: str, engine: EngineSpec) -> str:
    """What was built: profiles, size, time, and what the engine says of itself where it could be asked."""
    size = f"{engine.file.size / 1e6:9.1f} MB{engine.seconds:8.1f} s"
    line = f"  {name:<20}{len(engine.profiles):3} profiles{size}"
    if engine.scratch is not None:
        line += f"{max(engine.scratch) / 1e6:9.1f} MB scratch"
    return f"{line}  attention {engine.attention}" if engine.attention else line


def _warn_of_attention(bundle: Bundle, engines: EngineManifest) -> None:
    from hart_runtime.runtime.memory.forecast import scores_of
    from hart_runtime.runtime.tensorrt.inspection import FUSED

    most = engines.options.batches[1]
    for name, engine in engines.engines.items():
        if engine.attention not in {None, FUSED}:
            log.warning(
                "%s: its attention is %s; where it is not fused, %.3g GB of scores are written and read at "
                "the last scale",
                name,
                engine.attention,
                scores_of(bundle.manifest, name, most) / 1e9,
            )


def _tell_memory(bundle: Bundle, options: BuildOptions, engines: EngineManifest | None) -> None:
    """What drawing the smallest and the largest batch needs; the engines' own scratch where it is known."""
    from hart_runtime.runtime.memory.forecast import needed, sentence
    from hart_runtime.runtime.memory.gpu import shares_memory

    shared = shares_memory()
    asked = [spec.scratch for spec in engines.engines.values()] if engines else []
    scratch = max((max(sizes) for sizes in asked if sizes), default=None) if all(asked) else None
    for batch in sorted(set(options.batches)):
        memory = needed(bundle.manifest, batch, scratch=scratch, engines=True, keep=options.keep)
        click.echo(sentence(batch, memory, shared))


def parse_capabilities(text: str | None) -> tuple[str, ...]:
    """``"8.6,8.9"`` to ("8.6", "8.9")."""
    parts = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not all(re.fullmatch(r"[1-9][0-9]?\.[0-9]", part) for part in parts or [""]):
        raise InputError(f"`compute_capabilities`: expected numbers such as 8.6,8.9, found {shown(text)}")
    return tuple(sorted(parts, key=float))
