"""``hart-build``: engines from a bundle. Needs no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import FiniteRange, command
from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.precisions import FP16
from hart_runtime.runtime.backends.names import AUTO, MODULES
from hart_runtime.runtime.options import bundle_option

if TYPE_CHECKING:
    from hart_runtime.runtime.bundle import Bundle
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.package import Package


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
    help="TensorRT-RTX: GPUs to build for, such as 8.6,8.9,12.0. [default: this GPU, or Ampere and newer]",
)
@click.option("--workspace", type=FiniteRange(min=0.001), help="Most scratch memory, in GB.")
@click.option("--force", is_flag=True, help="Build what is current, too.")
def main(
    bundle: Path,
    backend: str,
    batch: str,
    scales: str,
    compute_capability: str | None,
    workspace: float | None,
    force: bool,
) -> None:
    """Build the engines of the bundle in BUNDLE, those that are not there or not current.

    An engine is a program for the GPU: build engines yourself, or take them only from someone
    whose programs you would run.
    """
    from hart_runtime.runtime.bundle import open_bundle
    from hart_runtime.runtime.tensorrt.build import parse_batches
    from hart_runtime.runtime.tensorrt.builder import BuildOptions
    from hart_runtime.runtime.tensorrt.package import how_to_install

    options = BuildOptions(
        batches=parse_batches(batch),
        per_scale=scales == "static",
        compute_capabilities=parse_capabilities(compute_capability),
        workspace=workspace,
    )
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if not manifest.kind.engines:
        raise InputError(
            f"{opened.folder}: is an {manifest.precision} bundle, which only the CPU runs; "
            f"export the checkpoint with {parameter('precision', FP16)} for engines"
        )
    package = choose_package(backend)
    if package is None:
        raise InputError(f"neither TensorRT (with a GPU) nor TensorRT-RTX is here; {how_to_install()}")
    report(opened, package, options, force)


def choose_package(backend: str) -> Package | None:
    """The package asked for, or with "auto" the first that can build here, if there is one."""
    from hart_runtime.runtime.memory.gpu import compute_capability
    from hart_runtime.runtime.tensorrt.package import available_packages, import_package

    if backend != AUTO:
        return import_package(backend)
    gpu = compute_capability() is not None
    return next((p for p in available_packages() if gpu or p.ahead_of_time), None)


def report(bundle: Bundle, package: Package, options: BuildOptions, force: bool = False) -> None:
    """Build and tell: progress on stderr, then a line per engine on stdout."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hart_runtime.runtime.memory.gpu import compute_capability as present
    from hart_runtime.runtime.tensorrt.build import build_engines
    from hart_runtime.runtime.tensorrt.builder import Phase

    capability = present()
    if capability is None and not package.ahead_of_time:
        raise InputError(
            f"{parameter('backend', package.name)}: it builds on the GPU it builds for, and found none"
        )
    start = time.perf_counter()
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

        folder, manifest, built = build_engines(bundle, package, options, capability, force, watch)
    for name in built:
        spec = manifest.engines[name]
        click.echo(
            f"  {name:<20}{len(spec.profiles):3} profiles{spec.file.size / 1e6:9.1f} MB{spec.seconds:8.1f} s"
        )
    size = sum(spec.file.size for spec in manifest.engines.values())
    done = f"{len(built)} engines built" if built else "every engine is current"
    click.echo(f"{folder}: {done}, {size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s")


def parse_capabilities(text: str | None) -> tuple[str, ...]:
    """``"8.6,8.9"`` to ("8.6", "8.9")."""
    parts = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    for part in parts:
        major, dot, minor = part.partition(".")
        if not (dot and part.isascii() and major.isdecimal() and minor.isdecimal()):
            raise InputError(f"`compute_capabilities`: expected numbers such as 8.6,8.9, found {part!r}")
    return tuple(sorted(parts, key=float))
