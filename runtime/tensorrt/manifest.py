"""The engines of a bundle on disk: where they lie, what they were built from, whether they fit.

Engines are programs: one that does not match the hash in its manifest is never loaded, and the
manifest itself is only as trustworthy as whoever sent the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hart_runtime.common.errors import InputError, listed, named, parameter, shown, told_of
from hart_runtime.common.files import read_regular
from hart_runtime.common.records import read_record
from hart_runtime.common.settings import MOST_MAX_BATCH, parse_keep
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.families.names import FAST
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.manifest import FileSpec, Manifest, check_file_spec
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.spec import LARGEST_OWN, GraphSpec, TensorSpec
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.package import Package, graph_read, operating_system
from hart_runtime.runtime.tensorrt.profiles import Profile, scale_rows

ENGINE_SCHEMA = 3
ENGINE_MANIFEST = "engines.json"
RANGES = [option.name for option in fields(BuildOptions) if "tuple[int, int]" in str(option.type)]
"""Options that are two numbers: pictures at once, and codes kept a token."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine."""

    file: FileSpec
    sources: dict[str, str]
    """sha256 of the graph and of the weights that it was built from."""
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    on_host: tuple[str, ...]
    """Inputs that the engine reads on the host."""
    seconds: float
    """What the build took."""
    scratch: tuple[int, ...] | None = None
    """Bytes that each profile needs while it runs; None where the engine could not be loaded to ask it."""
    attention: str | None = None
    """Whether its attention is fused, of graphs that have any, in words of
    :mod:`hart_runtime.runtime.tensorrt.inspection`; None where it could not be asked."""


@dataclass(frozen=True)
class EngineManifest:
    """Contents of ``engines.json``."""

    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    """Empty where the package's own default was taken."""
    gpu: Gpu | None
    """The model that alone runs them; None where every GPU of these capabilities does."""
    system: str
    precision: str
    options: BuildOptions
    engines: dict[str, EngineSpec]
    """By the name of the loop's graph."""
    schema: int = ENGINE_SCHEMA


def graphs_of(manifest: Manifest, keep: str | None) -> dict[str, GraphSpec]:
    """Graphs that engines are built of, with that of drawings that leave tokens out where it is asked for."""
    own = manifest.engined.keys() | ({FAST} if keep is not None else set())
    return {name: spec for name, spec in manifest.graphs.items() if name in own}


def engine_file(name: str) -> str:
    """File name of a graph's engine."""
    return f"{name}.engine"


def folder_name(
    package: Package, capabilities: Sequence[str], precision: str, system: str | None = None
) -> str:
    """Such as ``tensorrt-rtx-1.7.1.116-sm86-sm89-linux-x86_64-fp16``."""
    target = "-".join(f"sm{c.replace('.', '')}" for c in sorted(capabilities, key=float)) or "portable"
    return "-".join([package.name, package.version, target, system or operating_system(), precision])


def sources(package: Package, manifest: Manifest, graph: GraphSpec) -> dict[str, str]:
    """What an engine depends on, by hash."""
    return {name: manifest.files[name].identity for name in (graph_read(package, graph), WEIGHTS)}


def write_engine_manifest(manifest: EngineManifest, folder: Path) -> None:
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    (folder / ENGINE_MANIFEST).write_text(text, encoding="utf-8")


def read_engine_manifest(folder: Path) -> EngineManifest:
    """Read ``engines.json``.

    Raises:
        InputError: it is missing, damaged or of another schema.
    """
    file = folder / ENGINE_MANIFEST
    try:
        values = json.loads(read_regular(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: the engine manifest is damaged ({error}); build the engines again"
        ) from None
    found = values.get("schema") if isinstance(values, dict) else None
    if found != ENGINE_SCHEMA:
        newer = isinstance(found, int) and found > ENGINE_SCHEMA
        raise InputError(
            f"{file}: schema {shown(found)} is {'newer' if newer else 'older'} than the {ENGINE_SCHEMA} this "
            f"version reads; {'upgrade hart-runtime or ' if newer else ''}build the engines again"
        )
    try:
        manifest = read_record(EngineManifest, values, str(file))
        _check_options(manifest.options, f"{file}: options")
        for name, engine in manifest.engines.items():
            check_file_spec(engine.file, f"{file}: engines.{name}.file")
    except InputError as error:
        raise InputError(f"{error}; build the engines again") from None
    return manifest


def _check_options(options: BuildOptions, place: str) -> None:
    """Refuse ranges that nothing is built for."""
    for name, most in zip(RANGES, (MOST_MAX_BATCH, LARGEST_OWN["vocab_size"]), strict=True):
        pair = getattr(options, name)
        if pair is not None and not 1 <= pair[0] <= pair[1] <= most:
            raise InputError(f"{place}.{name}: expected two numbers from 1 to {most}, found {list(pair)}")
    if options.keep is not None:
        with told_of(f"{place}.keep"):
            parse_keep(options.keep)
    if options.workspace is not None and options.workspace <= 0:
        raise InputError(f"{place}.workspace: expected more than 0, found {options.workspace}")


def _check_profiles(manifest: EngineManifest, bundle: Bundle, file: Path) -> None:
    """Refuse engines whose profiles are not those of the bundle's graphs.

    Raises:
        InputError: there are too few or too many, or one lacks an input or has a range of its own kind.
    """
    for name, graph in graphs_of(bundle.manifest, manifest.options.keep).items():
        place, engine = f"{file}: engines.{name}.profiles", manifest.engines[name]
        rows = len(scale_rows(bundle.manifest, name, 1))
        if len(engine.profiles) not in (1, rows):
            raise InputError(
                f"{place}: expected {rows} or one for all, found {len(engine.profiles)}; "
                f"build the engines again"
            )
        ranks = {spec.name: len(spec.shape) for spec in graph.inputs}
        deciding = bundle.manifest.contract(name).deciding()
        for number, profile in enumerate(engine.profiles):
            held = {key: len(found.min) for key, found in profile.shapes.items()}
            whole = all(found.rises for found in (*profile.shapes.values(), *profile.values.values()))
            if held != ranks or not whole or not set(deciding) <= profile.values.keys():
                raise InputError(
                    f"{place}[{number}]: expected rising ranges of {listed(sorted(ranks))}, found "
                    f"{listed(sorted(held))}; build the engines again"
                )


def find_engines(bundle: Bundle, package: Package, gpu: Gpu) -> tuple[Path, EngineManifest]:
    """The engines of a bundle that run with this package on this GPU.

    Nothing is deserialized here; everything that can be compared is compared first.

    Raises:
        InputError: there are none, or they are for something else; the message names both sides
            and the command that mends it.
    """
    wanted = f"{package.name} {package.version}, compute capability {gpu.capability}, {operating_system()}"
    found = []
    for file in sorted(bundle.folder.glob(f"{package.name}-[0-9]*/{ENGINE_MANIFEST}")):
        manifest = read_engine_manifest(file.parent)
        if manifest.package != package.name:
            continue
        reasons = mismatches(manifest, bundle, package, gpu)
        if not reasons:
            _check_profiles(manifest, bundle, file)
            _verify_files(file.parent, manifest, bundle)
            return file.parent, manifest
        found.append(f"{file.parent.name}: {'; '.join(reasons)}")
    mend = build_command(bundle.folder, package.name)
    if not found:
        raise InputError(f"{bundle.folder}: holds no {package.name} engines; build them with: {mend}")
    raise InputError(f"no engines for {wanted} ({' | '.join(found)}); build them with: {mend}")


def options_of(bundle: Bundle, package: Package) -> list[BuildOptions]:
    """What the engines of a package's version were built with, for each folder of them in a bundle."""
    found = []
    for file in sorted(bundle.folder.glob(f"{package.name}-{package.version}-*/{ENGINE_MANIFEST}")):
        try:
            found.append(read_engine_manifest(file.parent).options)
        except InputError:
            continue  # what cannot be read is nobody's
    return found


def largest_batch(bundle: Bundle) -> int:
    """Pictures at once that all engines of a bundle hold, whatever package they are for."""
    most = bundle.manifest.max_batch
    for file in bundle.folder.glob(f"*/{ENGINE_MANIFEST}"):
        with contextlib.suppress(InputError):  # what cannot be read is not run either
            most = min(most, read_engine_manifest(file.parent).options.batches[1])
    return most


def build_command(bundle: Path, package: str, force: bool = False) -> str:
    """The command that builds a bundle's engines, in the words of messages."""
    forced = " `force=True`" if force else ""
    return f"hart-build {parameter('bundle', bundle)} {parameter('backend', package)}{forced}"


def spelled(values: tuple[int, int]) -> str:
    """A number or a range, as options take them: 4, or 1..4."""
    low, high = values
    return str(low) if low == high else f"{low}..{high}"


def mismatches(manifest: EngineManifest, bundle: Bundle, package: Package, gpu: Gpu) -> list[str]:
    """What keeps these engines from running here; empty if nothing does."""
    reasons = []
    if manifest.version != package.version:
        reasons.append(f"built with {package.name} {named(manifest.version)}, installed is {package.version}")
    if manifest.compute_capabilities and gpu.capability not in manifest.compute_capabilities:
        built = listed(manifest.compute_capabilities)
        reasons.append(f"built for compute capability {built}, this GPU has {gpu.capability}")
    elif manifest.gpu is not None and not manifest.gpu.is_like(gpu):
        reasons.append(f"built on {manifest.gpu}, this is {gpu}")
    if manifest.system != operating_system():
        reasons.append(f"built on {named(manifest.system)}, this is {operating_system()}")
    graphs = graphs_of(bundle.manifest, manifest.options.keep)
    if missing := sorted(set(graphs) - set(manifest.engines)):
        reasons.append(f"{', '.join(missing)} not built")
    stale = [
        name
        for name, graph in graphs.items()
        if name in manifest.engines
        and manifest.engines[name].sources != sources(package, bundle.manifest, graph)
    ]
    if stale:
        reasons.append(f"{', '.join(stale)} built from other graphs than the bundle has now")
    return reasons


def _verify_files(folder: Path, manifest: EngineManifest, bundle: Bundle) -> None:
    for name in graphs_of(bundle.manifest, manifest.options.keep):
        engine = manifest.engines[name]
        path = folder / engine_file(name)
        if not path.is_file():
            mend = build_command(bundle.folder, manifest.package)
            raise InputError(f"{path}: missing; build it with: {mend}")
        try:
            same = bundle.seal.matches(path, engine.file)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not same:
            mend = build_command(bundle.folder, manifest.package, force=True)
            raise InputError(
                f"{path}: expected sha256 {engine.file.identity[:12]}..., found another; the file "
                f"was changed and is not loaded, build it again with: {mend}"
            )
