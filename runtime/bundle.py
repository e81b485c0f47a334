"""The bundle: a folder of graphs, weights and a manifest that describes and seals them.

Written by ``export/``, read by everything that runs. The manifest lists every file with its
size and sha256; a bundle is only opened when all of them agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hart_runtime.common.checkpoint import AVERAGED, LLM
from hart_runtime.common.errors import InputError, one_of
from hart_runtime.common.files import pieces_of, sha256_of_pieces
from hart_runtime.common.noise import NOISE_VERSION
from hart_runtime.common.precisions import FP32, PRECISIONS, Precision
from hart_runtime.common.settings import DEFAULT_MAX_BATCH, SamplingSettings, check_ranges, settings_of
from hart_runtime.runtime.contract import Contract, Contracts, specs_of
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.names import TEXT_ENCODER
from hart_runtime.runtime.find import MANIFEST, WEIGHTS, find_bundle
from hart_runtime.runtime.program import Program, make_program
from hart_runtime.runtime.shapes import Dims, same_tensor
from hart_runtime.runtime.spec import GraphSpec, ModelSpec, TensorSpec

SCHEMA_VERSION = 3
TEXT_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class FileSpec:
    """A file that the manifest seals."""

    size: int
    sha256: tuple[str, ...]
    """Of each piece of :data:`hart_runtime.common.files.PIECE` bytes; one for most files."""

    @property
    def identity(self) -> str:
        """One hash for all pieces."""
        first, *more = self.sha256
        return hashlib.sha256("".join(self.sha256).encode()).hexdigest() if more else first


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``."""

    family: str
    """One of :data:`hart_runtime.runtime.families.FAMILIES`."""
    name: str
    precision: str
    """Name of the type of the matrix products, see :mod:`hart_runtime.common.precisions`."""
    max_batch: int
    model: ModelSpec
    sampling: SamplingSettings
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    checkpoint: dict[str, Any]
    """Where the weights came from: source, configuration, sha256 of each weight file."""
    tools: dict[str, str]
    """Versions of what wrote the bundle."""
    noise: int = NOISE_VERSION
    """Version of the random numbers that seeds stand for."""
    schema: int = SCHEMA_VERSION

    @property
    def kind(self) -> Precision:
        """What follows from the precision."""
        return PRECISIONS[self.precision]

    @property
    def contracts(self) -> Contracts:
        """What is true of the graphs of this family."""
        return FAMILIES[self.family].graphs

    def contract(self, graph: str) -> Contract:
        """What is true of a graph; of one that no family has, such as a benchmark's own, nothing special."""
        return self.contracts.get(graph) or Contract(graph, graph, (), ())

    @property
    def averaged(self) -> bool:
        """Whether it was exported from averaged weights (EMA)."""
        return AVERAGED in self.checkpoint["weights"][LLM]

    def scale_dims(self, batch: int) -> list[Dims]:
        """The free dimensions of graphs at each scale."""
        return FAMILIES[self.family].dims(self.model, batch)

    @property
    def cache_length(self) -> int:
        """Tokens in the KV cache when the last scale starts; nothing ever reads those of the last one."""
        return self.scale_dims(1)[-1].get("past", 0)

    def program(self, settings: SamplingSettings, batch: int) -> Program:
        """What a drawing of ``batch`` pictures does."""
        family = FAMILIES[self.family]
        return make_program(batch, self.graphs, family.steps(self.model, settings, batch), family.decode)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    folder: Path
    manifest: Manifest
    identity: str = field(repr=False)
    """sha256 of the manifest, and with it of everything in the bundle."""

    @property
    def has_text_encoder(self) -> bool:
        return TEXT_ENCODER in self.manifest.graphs

    def parts(self) -> tuple[Bundle, Bundle]:
        """The text encoder and everything else, each to be opened by itself."""

        def part(text: bool) -> Bundle:
            chosen = {k: v for k, v in self.manifest.graphs.items() if (k == TEXT_ENCODER) is text}
            return replace(self, manifest=replace(self.manifest, graphs=chosen))

        return part(True), part(False)

    def path(self, name: str) -> Path:
        """Absolute path of a file the manifest lists."""
        return self.folder / name


def manifest_of(
    family: str,
    model: ModelSpec,
    precision: str = FP32,
    max_batch: int = DEFAULT_MAX_BATCH,
    sampling: SamplingSettings | None = None,
) -> Manifest:
    """The manifest that a model's export will have, from its sizes alone: without files and origin.

    Args:
        sampling: default settings; those of the published sampler if left out.
    """
    one_of("precision", precision, PRECISIONS)
    graphs = specs_of(FAMILIES[family].graphs, model, precision)
    settings = sampling or SamplingSettings()
    return Manifest(family, "planned", precision, max_batch, model, settings, graphs, {}, {}, {})


def check_contract(manifest: Manifest, source: str) -> None:
    """Compare the graphs of a manifest with the contract: what the loop feeds and reads.

    Raises:
        InputError: one is missing or unknown, or has other inputs or outputs; begins with ``source``.
    """
    found = manifest.graphs
    contracts = {k: v for k, v in manifest.contracts.items() if k != TEXT_ENCODER or k in found}
    expected = specs_of(contracts, manifest.model, manifest.precision)
    mend = "it was made by another version, export the bundle again"
    for what, names in (
        ("missing", expected.keys() - found.keys()),
        ("unknown", found.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{source}: graphs {', '.join(sorted(names))} {what}; {mend}")
    for name, spec in expected.items():
        if (spec.file, spec.forms) != (found[name].file, found[name].forms):
            raise InputError(
                f"{source}: graph {name}: files expected {spec.files}, found {found[name].files}; {mend}"
            )
        for kind, wanted, there in (
            ("inputs", spec.inputs, found[name].inputs),
            ("outputs", spec.outputs, found[name].outputs),
        ):
            if difference := _first_difference(wanted, there):
                raise InputError(f"{source}: graph {name}: {kind} {difference}; {mend}")


def _first_difference(wanted: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> str | None:
    for one, other in itertools.zip_longest(wanted, found):
        if one is None or other is None or not same_tensor(one, other):
            return f"expected {_said(one)}, found {_said(other)}"
    return None


def _said(tensor: TensorSpec | None) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" if tensor else "no more"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``; the last file of a bundle to be written."""
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def open_bundle(place: Path) -> Bundle:
    """Read the manifest and verify every file against it.

    Args:
        place: as :func:`hart_runtime.runtime.find.find_bundle` takes it.

    Raises:
        InputError: no bundle there, or several, or as :func:`read_manifest`, or a path outside the
            bundle, or a missing, truncated or changed file.
    """
    folder = find_bundle(place)
    manifest, identity = read_manifest(folder)
    check_contract(manifest, str(folder / MANIFEST))
    verify_files(folder, manifest)
    return Bundle(folder, manifest, identity)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle and its sha256; no other file is looked at.

    Raises:
        InputError: it has another schema, or cannot be used.
    """
    file = folder / MANIFEST
    try:
        raw = file.read_bytes()
        values = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable manifest ({error})") from None
    found = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(found, int) or found < 1:
        raise InputError(f"{file}: not a bundle manifest, expected a schema number, found {found!r}")
    if found != SCHEMA_VERSION:
        newer = found > SCHEMA_VERSION
        raise InputError(
            f"{file}: schema {found} is {'newer' if newer else 'older'} than the {SCHEMA_VERSION} this "
            f"version reads; {'upgrade hart-runtime or ' if newer else ''}export the bundle again"
        )
    try:
        manifest = _parse(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file}: the manifest is damaged ({type(error).__name__}: {error}); export the bundle again"
        ) from None
    return manifest, hashlib.sha256(raw).hexdigest()


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its entry in the manifest."""
    root = folder.resolve()
    needed = {WEIGHTS, *(file for graph in manifest.graphs.values() for file in graph.files)}
    if TEXT_ENCODER in manifest.graphs:
        needed.add(TEXT_TOKENIZER)
    if unsealed := sorted(needed - set(manifest.files)):
        raise InputError(f"{folder / MANIFEST}: {', '.join(unsealed)} not listed in files")
    for name, expected in manifest.files.items():
        try:
            _verify(folder, root, name, expected)
        except OSError as error:
            raise InputError(f"{folder}: {name!r} cannot be read ({error.strerror})") from None


def _verify(folder: Path, root: Path, name: str, expected: FileSpec) -> None:
    pure = PurePosixPath(name)
    path = folder / name
    outside = pure.is_absolute() or ".." in pure.parts or any(c in name for c in "\\:\0")
    if outside or not path.resolve().is_relative_to(root):
        raise InputError(f"{folder / MANIFEST}: {name!r} leaves the bundle, refused")
    if not path.is_file():
        raise InputError(f"{path}: missing from the bundle; export it again")
    size = path.stat().st_size
    if size != expected.size:
        raise InputError(
            f"{path}: expected {expected.size} bytes, found {size}; the file is "
            f"truncated or was changed, export the bundle again"
        )
    for wanted, found in zip(expected.sha256, sha256_of_pieces(path), strict=True):
        if found != wanted:
            raise InputError(
                f"{path}: expected sha256 {wanted[:12]}..., found {found[:12]}...; "
                f"the file was changed, export the bundle again"
            )


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileSpec]:
    """Hash and size of files that a bundle is about to seal."""
    return {name: FileSpec((folder / name).stat().st_size, sha256_of_pieces(folder / name)) for name in names}


def file_spec(values: dict[str, Any]) -> FileSpec:
    """As it was written; a ValueError if there is not a hash for every piece."""
    spec = FileSpec(int(values["size"]), tuple(str(digest) for digest in values["sha256"]))
    if len(spec.sha256) != pieces_of(spec.size):
        raise ValueError(f"{len(spec.sha256)} hashes for {spec.size} bytes")
    return spec


def _parse(values: dict[str, Any]) -> Manifest:
    def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(r["name"], r["dtype"], tuple(r["shape"])) for r in rows)

    graphs = {
        name: GraphSpec(
            str(g["file"]), int(g["opset"]), tensors(g["inputs"]), tensors(g["outputs"]), dict(g["forms"])
        )
        for name, g in values["graphs"].items()
    }
    model: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()}
    if values["precision"] not in PRECISIONS:
        raise ValueError(f"precision {values['precision']!r}, expected {' or '.join(PRECISIONS)}")
    if values["family"] not in FAMILIES:
        raise ValueError(f"family {values['family']!r}, expected {' or '.join(FAMILIES)}")
    sizes, sampling = ModelSpec(**model), settings_of(values["sampling"], "sampling")
    check_ranges(sampling, sizes)
    return Manifest(
        family=str(values["family"]),
        name=str(values["name"]),
        precision=str(values["precision"]),
        max_batch=int(values["max_batch"]),
        model=sizes,
        sampling=sampling,
        graphs=graphs,
        files={k: file_spec(v) for k, v in values["files"].items()},
        checkpoint=dict(values["checkpoint"]),
        tools=dict(values["tools"]),
        noise=int(values["noise"]),
        schema=values["schema"],
    )
