"""Builds every engine of a bundle into one folder, and only those that are not current."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hart_runtime.common.errors import InputError, parameter, shown
from hart_runtime.common.files import whole_folder
from hart_runtime.common.hashing import sha256_of_pieces
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.names import ONNXRUNTIME
from hart_runtime.runtime.bundle import Bundle, describe_files
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import FAST
from hart_runtime.runtime.manifest import FileSpec, Manifest
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.memory.plan import ALIGNMENT, make_plan
from hart_runtime.runtime.owned import owned_by_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions, Phase, build_engine, signals_wait
from hart_runtime.runtime.tensorrt.float8 import for_float8
from hart_runtime.runtime.tensorrt.manifest import (
    ENGINE_MANIFEST,
    EngineManifest,
    EngineSpec,
    engine_file,
    folder_name,
    graphs_of,
    read_engine_manifest,
    sources,
    spelled,
    write_engine_manifest,
)
from hart_runtime.runtime.tensorrt.package import Package, graph_read, operating_system
from hart_runtime.runtime.tensorrt.profiles import LARGEST_TOP_K, Profile, make_profiles, settings_run
from hart_runtime.runtime.tensorrt.timing_cache import TimingCache

Watch = Callable[[str, int, int], Phase]
"""Called with an engine's name, its number and how many there are; returns who follows its build."""


@dataclass(frozen=True)
class Job:
    """One engine that a bundle should have."""

    name: str
    profiles: tuple[Profile, ...]
    reason: str | None
    """Why it has to be built; None where it is current."""


def plan_engines(
    bundle: Bundle, package: Package, options: BuildOptions, gpu: Gpu | None = None, force: bool = False
) -> tuple[Path, list[Job]]:
    """What there would be to build; nothing of the package's own is used for it.

    Returns:
        The folder of the engines, and a job for each.

    Raises:
        InputError: options that the bundle, the package or a device cannot follow.
    """
    manifest = bundle.manifest
    options = for_float8(manifest, package.ahead_of_time, options, gpu)
    _check_options(manifest, package, options)
    target = bundle.folder / folder_name(package, _capabilities(options, gpu), manifest.precision)
    existing = _existing(target)
    jobs = []
    for name in graphs_of(manifest, options.keep):
        profiles = make_profiles(
            manifest, name, options.batches, options.per_scale, options.top_k, options.keep
        )
        job = Job(name, tuple(profiles), "it is forced" if force else None)
        reasons = _reasons(bundle, package, options, gpu, target, existing, job)
        jobs.append(job if force else replace(job, reason=next(reasons, None)))
    return target, jobs


def build_engines(
    bundle: Bundle,
    package: Package,
    options: BuildOptions,
    gpu: Gpu | None = None,
    force: bool = False,
    watch: Watch = lambda *_: lambda *_: None,
) -> tuple[Path, EngineManifest, list[str]]:
    """Bring the engines of a bundle up to date.

    Args:
        gpu: that is built for, where ``options`` name no compute capability.

    Returns:
        The folder, its manifest, and the engines that had to be built.

    Raises:
        InputError: as :func:`plan_engines`, or a folder that cannot be written.
        RunError: the package refuses a graph. The bundle is then as it was before, and what was measured
            on the way is in the timing cache.
    """
    manifest = bundle.manifest
    options = for_float8(manifest, package.ahead_of_time, options, gpu)
    target, jobs = plan_engines(bundle, package, options, gpu, force)
    existing = _existing(target)
    missing = [job for job in jobs if job.reason is not None]
    if existing is not None and existing.options == options and not missing:
        return target, existing, []
    capabilities, graphs = _capabilities(options, gpu), graphs_of(manifest, options.keep)
    cache = TimingCache(package, gpu, bundle.folder)
    inspected = gpu is not None and (not capabilities or gpu.capability in capabilities)
    engines: dict[str, EngineSpec] = {}
    with whole_folder(target, owned_by_engines) as partial:
        for job in (job for job in jobs if job.reason is None):
            assert existing is not None
            engines[job.name] = existing.engines[job.name]
            _link(target / engine_file(job.name), partial / engine_file(job.name))
        for number, job in enumerate(missing):
            name, graph, start = job.name, graphs[job.name], time.perf_counter()
            with signals_wait() as stopped:
                built = build_engine(
                    package,
                    bundle.path(graph_read(package, graph)),
                    graph,
                    job.profiles,
                    options,
                    cache,
                    inspected,
                    watch(name, number, len(missing)),
                    stopped,
                )
            bundle.seal.check()  # it was built from what was hashed
            (partial / engine_file(name)).write_bytes(built.serialized)
            attends, seen = manifest.contract(name).scores != "0", built.inspection
            engines[name] = EngineSpec(
                file=describe_files(partial, [engine_file(name)])[engine_file(name)],
                sources=sources(package, manifest, graph),
                profiles=job.profiles,
                inputs=graph.inputs,
                outputs=graph.outputs,
                on_host=built.on_host,
                seconds=round(time.perf_counter() - start, 3),
                scratch=seen.scratch if seen else None,
                attention=seen.attention if seen and attends else None,
            )
        result = EngineManifest(
            package=package.name,
            version=package.version,
            compute_capabilities=capabilities,
            gpu=None if package.ahead_of_time else gpu,
            system=operating_system(),
            precision=manifest.precision,
            options=options,
            engines={name: engines[name] for name in graphs},
        )
        write_engine_manifest(result, partial)
    return target, result, [job.name for job in missing]


def _capabilities(options: BuildOptions, gpu: Gpu | None) -> tuple[str, ...]:
    return options.compute_capabilities or ((gpu.capability,) if gpu else ())


def _check_options(manifest: Manifest, package: Package, options: BuildOptions) -> None:
    low, high = options.batches
    if not 1 <= low <= high <= manifest.max_batch:
        raise InputError(
            f"`batches`: expected 1..{manifest.max_batch} (the bundle's maximum), "
            f"found {spelled(options.batches)}"
        )
    if options.top_k is not None:
        fewest, most = options.top_k
        largest = min(manifest.model.vocab_size, LARGEST_TOP_K)
        if not 1 <= fewest <= most <= largest:
            limit = f"{package.name} keeps no more" if largest == LARGEST_TOP_K else "all that there are"
            raise InputError(f"`top_k`: expected 1..{largest} ({limit}), found {spelled(options.top_k)}")
    drawn = [manifest.sampling]
    if options.keep is not None:
        drawn += _checked_keep(manifest, package, options.keep)
    for batch, settings in itertools.product(range(low, high + 1), drawn):
        if found := _misaligned(manifest, settings, batch):
            raise InputError(
                f"`backend`: {found} would lie at an address that is no multiple of {ALIGNMENT}, which "
                f"{package.name} does not take; draw with {parameter('backend', ONNXRUNTIME)}, or export a "
                f"model of other sizes"
            )


def _checked_keep(manifest: Manifest, package: Package, keep: str) -> list[SamplingSettings]:
    """Settings of the drawings that leave tokens out.

    Raises:
        InputError: the model has no tokens to leave out, or the package cannot choose as many.
    """
    if why := manifest.lacks.get("keep"):
        raise InputError(f"{parameter('keep', keep)}: {why}")
    drawn = settings_run(manifest, FAST, keep)
    for scale, dims in enumerate(manifest.scale_dims(1, drawn[0])):
        if dims["chosen"] > LARGEST_TOP_K:
            raise InputError(
                f"{parameter('keep', keep)}: {dims['chosen']} tokens of scale {scale} take part, and "
                f"{package.name} chooses at most {LARGEST_TOP_K}; leave more of them out"
            )
    return drawn


def _misaligned(manifest: Manifest, settings: SamplingSettings, batch: int) -> str | None:
    """A tensor of a drawing that begins between the addresses that engines take.

    Memory of its own is always aligned. New tokens stand right behind old ones, and pictures of a batch
    behind each other, wherever the sizes of the model put them.
    """
    if FAMILIES[manifest.family].decode.graph not in manifest.graphs:
        return None  # graphs that draw nothing
    plan = make_plan(manifest.program(settings, batch), every_output=True)
    for call in plan.calls:
        for name, view in (*call.inputs.items(), *call.outputs.items()):
            if view is not None and view.nbytes and view.offset % ALIGNMENT:
                return f"{name} of {call.graph}, with {batch} pictures at once,"
    return None


def _reasons(
    bundle: Bundle,
    package: Package,
    options: BuildOptions,
    gpu: Gpu | None,
    target: Path,
    existing: EngineManifest | None,
    job: Job,
) -> Iterator[str]:
    """Why an engine has to be built; nothing if it is there and current."""
    if existing is None:
        found = bundle.folder.glob(f"{package.name}-[0-9]*/{ENGINE_MANIFEST}")
        others = sorted(file.parent.name for file in found)
        if target.name in others:
            yield "the manifest of the engines cannot be read"
        yield f"there are only {', '.join(others)}" if others else "there are no engines yet"
        return
    name, file = job.name, target / engine_file(job.name)
    engine = existing.engines.get(name)
    if existing.gpu is not None and gpu is not None and not existing.gpu.is_like(gpu):
        yield f"it was built on another GPU, {existing.gpu}"
    if engine is None:
        yield "it was not built"
        return
    for option in ("workspace", "tf32"):  # what the others decide is in profiles, and in the folder's name
        if getattr(options, option) != getattr(existing.options, option):
            yield f"another `{option}` is asked for"
    if engine.profiles != job.profiles:
        yield "other batches, scales or values are asked for"
    if engine.sources != sources(package, bundle.manifest, bundle.manifest.graphs[name]):
        yield "its graph or the weights changed"
    if not file.is_file():
        yield "its file is missing"
    elif not _unchanged(file, engine.file):
        yield "its file is damaged"


def parse_range(given: str, text: str) -> tuple[int, int]:
    """``"4"`` is (4, 4), ``"1..4"`` is (1, 4); ``given`` is what messages call it."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:\.\.\s*([0-9]{1,9})\s*)?", text)
    if found is None:
        raise InputError(f"{given}: expected a number or a range such as 1..4, found {shown(text)}")
    return int(found[1]), int(found[2] or found[1])


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
