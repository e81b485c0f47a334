"""The bundle: a folder of graphs, weights and a manifest that describes and seals them.

Written by ``export/``, read by everything that runs. The manifest lists every file with its
size and sha256; a bundle is only opened when all of them agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from hart_runtime.common.errors import InputError
from hart_runtime.common.files import sha256_of_pieces
from hart_runtime.runtime.families.names import TEXT_ENCODER
from hart_runtime.runtime.find import MANIFEST, WEIGHTS, find_bundle
from hart_runtime.runtime.manifest import FileSpec, Manifest, check_contract, read_manifest

TEXT_TOKENIZER = "tokenizer.json"


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
