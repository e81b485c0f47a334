"""Builds every engine of a bundle into one folder, and only those that are not current."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from hart_runtime.common.errors import InputError
from hart_runtime.common.files import sha256_of_pieces, whole_folder
from hart_runtime.runtime.bundle import Bundle, describe_files
from hart_runtime.runtime.manifest import FileSpec
from hart_runtime.runtime.tensorrt.builder import BuildOptions, Phase, build_engine, signals_wait
from hart_runtime.runtime.tensorrt.manifest import (
    ENGINE_MANIFEST,
    EngineManifest,
    EngineSpec,
    engine_file,
    folder_name,
    read_engine_manifest,
    sources,
    write_engine_manifest,
)
from hart_runtime.runtime.tensorrt.package import Package, graph_read, operating_system
from hart_runtime.runtime.tensorrt.profiles import decided_ranges, make_profiles

Watch = Callable[[str, int, int], Phase]
"""Called with an engine's name, its number and how many there are; returns who follows its build."""


def build_engines(
    bundle: Bundle,
    package: Package,
    options: BuildOptions,
    capability: str | None = None,
    force: bool = False,
    watch: Watch = lambda *_: lambda *_: None,
) -> tuple[Path, EngineManifest, list[str]]:
    """Bring the engines of a bundle up to date.

    Args:
        capability: compute capability of the GPU that is built for, where ``options`` name none.

    Returns:
        The folder, its manifest, and the engines that had to be built.

    Raises:
        InputError: a batch over the bundle's maximum, or a folder that cannot be written.
        RunError: the package refuses a graph. The bundle is then as it was before.
    """
    low, high = options.batches
    if not 1 <= low <= high <= bundle.manifest.max_batch:
        raise InputError(
            f"`batches`: expected 1..{bundle.manifest.max_batch} (the bundle's maximum), found {low}..{high}"
        )
    capabilities = options.compute_capabilities or ((capability,) if capability else ())
    manifest = bundle.manifest
    target = bundle.folder / folder_name(package, capabilities, manifest.precision)
    graphs = manifest.graphs
    wanted = {
        name: tuple(make_profiles(manifest, name, options.batches, options.per_scale)) for name in graphs
    }
    existing = _existing(target)
    kept = {
        name: engine
        for name, engine in (existing.engines if existing and not force else {}).items()
        if existing is not None
        and existing.options == options
        and name in graphs
        and engine.sources == sources(manifest, package, graphs[name])
        and engine.profiles == wanted[name]
        and _unchanged(target / engine_file(name), engine.file)
    }
    missing = [name for name in graphs if name not in kept]
    if existing is not None and not missing:
        return target, existing, []
    engines = dict(kept)
    with whole_folder(target, replace=True) as partial:
        for name in kept:
            _link(target / engine_file(name), partial / engine_file(name))
        for number, name in enumerate(missing):
            graph, start = graphs[name], time.perf_counter()
            with signals_wait() as stopped:
                serialized, on_host = build_engine(
                    package,
                    bundle.path(graph_read(package, graph)),
                    graph,
                    decided_ranges(manifest, name),
                    list(wanted[name]),
                    options,
                    watch(name, number, len(missing)),
                    stopped,
                )
            (partial / engine_file(name)).write_bytes(serialized)
            engines[name] = EngineSpec(
                file=describe_files(partial, [engine_file(name)])[engine_file(name)],
                sources=sources(manifest, package, graph),
                profiles=wanted[name],
                inputs=graph.inputs,
                outputs=graph.outputs,
                on_host=tuple(on_host),
                seconds=round(time.perf_counter() - start, 3),
            )
        result = EngineManifest(
            package=package.name,
            version=package.version,
            compute_capabilities=capabilities,
            system=operating_system(),
            precision=manifest.precision,
            options=options,
            engines={name: engines[name] for name in graphs},
        )
        write_engine_manifest(result, partial)
    return target, result, missing


def parse_batches(text: str) -> tuple[int, int]:
    """``"4"`` is (4, 4), ``"1..4"`` is (1, 4)."""
    low, _, high = text.partition("..")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise InputError(f"`batches`: expected a number or a range such as 1..4, found {text!r}") from None


def _existing(target: Path) -> EngineManifest | None:
    if not (target / ENGINE_MANIFEST).is_file():
        return None
    try:
        return read_engine_manifest(target)
    except InputError:
        return None  # what cannot be read is built again


def _unchanged(path: Path, file: FileSpec) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256_of_pieces(path) == file.sha256


def _link(source: Path, target: Path) -> None:
    """The same file in a second folder; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
