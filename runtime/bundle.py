"""The bundle: a folder of graphs, weights and a manifest that describes and seals them.

Written by ``export/``, read by everything that runs. The manifest lists every file with its
size and sha256; a bundle is only opened when all of them agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from hart_runtime.common.checkpoint import CLASS_NAMES
from hart_runtime.common.errors import InputError, listed, shown
from hart_runtime.common.files import resolved
from hart_runtime.common.hashing import sha256_of_pieces
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.families.names import FAST, TEXT_ENCODER, TRANSFORMER
from hart_runtime.runtime.find import MANIFEST, WEIGHTS, find_bundle
from hart_runtime.runtime.graph_check import bounds_of, check_graph
from hart_runtime.runtime.graph_file import Known
from hart_runtime.runtime.manifest import FileSpec, Manifest, check_contract, read_manifest
from hart_runtime.runtime.seal import Seal
from hart_runtime.runtime.spec import GraphSpec

TEXT_TOKENIZER = "tokenizer.json"
"""Some bundles have it, others :data:`hart_runtime.common.checkpoint.CLASS_NAMES`."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    folder: Path
    manifest: Manifest
    identity: str = field(repr=False)
    """sha256 of the manifest, and with it of everything in the bundle."""
    seal: Seal = field(default_factory=Seal, repr=False, compare=False)
    resized: bool = False
    """Whether it draws another size than its own, which its engines do not."""
    tokenizer: bytes = field(default=b"", repr=False, compare=False)
    """Contents of :data:`TEXT_TOKENIZER` that were hashed; empty without a text encoder."""

    @property
    def has_text_encoder(self) -> bool:
        return TEXT_ENCODER in self.manifest.graphs

    def at_size(self, size: int | None) -> Bundle:
        """The same bundle, drawing pictures of one of its sizes, by pixels of a side; raises InputError."""
        manifest = self.manifest.at_size(size)
        resized = manifest.model.patch_nums != self.manifest.model.patch_nums
        return replace(self, manifest=manifest, resized=resized)

    def parts(self) -> tuple[Bundle, Bundle]:
        """The text encoder and everything else, each to be opened by itself."""
        text = {TEXT_ENCODER} & self.manifest.graphs.keys()
        return self.part(text), self.part(self.manifest.graphs.keys() - text)

    def for_settings(self, settings: SamplingSettings) -> Bundle:
        """Without those of its transformers that these settings do not run."""
        runs = self.manifest.program(settings, 1).runs()
        unused = {TRANSFORMER, FAST} - {run.graph for run in runs}
        return self.part(self.manifest.graphs.keys() - unused)

    def part(self, graphs: Collection[str]) -> Bundle:
        """Some of its graphs."""
        chosen = {name: spec for name, spec in self.manifest.graphs.items() if name in graphs}
        return replace(self, manifest=replace(self.manifest, graphs=chosen))

    def path(self, name: str) -> Path:
        """Absolute path of a file the manifest lists."""
        return self.folder / name


def open_bundle(place: Path, wait: bool = True) -> Bundle:
    """Read the manifest, check every graph and verify every file against it.

    Args:
        place: as :func:`hart_runtime.runtime.find.find_bundle` takes it.
        wait: for the weights to be verified. Otherwise that goes on, and whatever opens the graphs waits
            for it before anything is run (:meth:`Seal.check`).

    Raises:
        InputError: no bundle there, or several, or as :func:`read_manifest`, or a path outside the
            bundle, or a missing, truncated or changed file, or a graph that is none of the contract's.
    """
    folder = find_bundle(place)
    manifest, identity = read_manifest(folder)
    check_contract(manifest, str(folder / MANIFEST))
    seal = Seal()
    contents = _verify_files(folder, manifest, seal)
    _check_graphs(folder, manifest, contents)
    if wait:
        seal.check()
    return Bundle(folder, manifest, identity, seal, tokenizer=contents.get(TEXT_TOKENIZER, b""))


def _verify_files(folder: Path, manifest: Manifest, seal: Seal) -> dict[str, bytes]:
    """Compare the files of a bundle with their entries; returns the contents of those that are parsed."""
    parsed = set(_graph_files(manifest))
    if TEXT_ENCODER in manifest.graphs:
        parsed.add(TEXT_TOKENIZER)
    if CLASS_NAMES in manifest.files:
        parsed.add(CLASS_NAMES)
    if unsealed := sorted(({WEIGHTS} | parsed) - manifest.files.keys()):
        raise InputError(f"{folder / MANIFEST}: {listed(unsealed)} not listed in files")
    for name in manifest.files:
        _refuse_outside(folder, name)
    _refuse_apart(folder, [WEIGHTS, *_graph_files(manifest)])
    contents = {}
    try:
        for name, expected in sorted(manifest.files.items(), key=lambda item: -item[1].size):
            if name in parsed:
                contents[name] = seal.read(folder / name, expected)
            else:
                seal.begin(folder / name, expected)
    except OSError as error:
        raise InputError(f"{folder}: {shown(name)} cannot be read ({error.strerror})") from None
    return contents


def _graph_files(manifest: Manifest) -> Iterator[str]:
    """Of all sizes and forms."""
    for graphs in (manifest.graphs, *(other.graphs for other in manifest.other_sizes)):
        for graph in graphs.values():
            yield from graph.files


def _refuse_outside(folder: Path, name: str) -> None:
    """By its name; a file may be a link to wherever it is kept, since its contents are sealed."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or any(c in name for c in "\\:\0"):
        raise InputError(f"{folder / MANIFEST}: {shown(name)} leaves the bundle, refused")


def _refuse_apart(folder: Path, names: Iterable[str]) -> None:
    """Libraries read the weights of a graph from beside it alone: in the bundle, or where links lead, as in
    a snapshot of the hub's cache.
    """
    weights, *graphs = (resolved(folder / name) for name in dict.fromkeys(names))
    if weights.is_relative_to(resolved(folder)) or all(graph.parent == weights.parent for graph in graphs):
        return
    raise InputError(
        f"{folder / WEIGHTS}: is a link to {weights}, and graphs read their weights from beside them alone; "
        f"copy it here, or move the bundle there as a whole and link its folder"
    )


def _check_graphs(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    known = Known({}, {})
    seen: set[str] = set()
    for each in manifest.every_size.values():
        own = {name: graph for name, graph in each.graphs.items() if graph.file not in seen}
        seen |= {graph.file for graph in own.values()}
        _check_those(folder, each, own, contents, known)


def _check_those(
    folder: Path,
    manifest: Manifest,
    graphs: Mapping[str, GraphSpec],
    contents: Mapping[str, bytes],
    known: Known,
) -> None:
    bounds = bounds_of(manifest.model, manifest.max_batch, manifest.files[WEIGHTS].size, manifest.tables)
    for name, graph in graphs.items():
        contract = manifest.contract(name)
        for form, file in ((None, graph.file), *graph.forms.items()):
            try:
                check_graph(contents[file], graph, contract.opset_of(form), contract, bounds, known)
            except InputError as error:
                raise InputError(f"{folder / file}: {error}; export the bundle again") from None


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileSpec]:
    """Hash and size of files that a bundle is about to seal."""
    return {name: FileSpec((folder / name).stat().st_size, sha256_of_pieces(folder / name)) for name in names}
