"""What was hashed is what is used: files that change, or are exchanged, while a bundle is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hart_runtime.common.errors import InputError
from hart_runtime.common.hashing import PIECE
from hart_runtime.runtime.bundle import describe_files
from hart_runtime.runtime.manifest import FileSpec
from hart_runtime.runtime.seal import Seal

CONTENTS = b"weights of a network" * 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(CONTENTS)
    return tmp_path / "weights.bin"


def spec_of(file: Path) -> FileSpec:
    return describe_files(file.parent, [file.name])[file.name]


def begun(file: Path, spec: FileSpec | None = None) -> Seal:
    """As when a library is about to open the file."""
    seal = Seal()
    seal.begin(file, spec or spec_of(file))
    return seal


def exchanged(file: Path) -> None:
    """By another of the same size and times."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(CONTENTS[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def written_into(file: Path) -> None:
    """With its times set back, which the system notes as a change."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"W")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, 10)


def led_elsewhere(file: Path) -> None:
    file.rename(file.with_name("moved"))
    same = file.with_name("same")
    same.write_bytes(CONTENTS)
    file.symlink_to(same)


@pytest.mark.parametrize("change", [exchanged, written_into, cut, led_elsewhere, Path.unlink])
def test_a_change_after_it_was_hashed(file: Path, change: Callable[[Path], None]) -> None:
    seal = begun(file)
    seal.check()
    change(file)
    with pytest.raises(InputError, match=rf"^{file}: was changed while the bundle was opened; try again$"):
        seal.check()


@pytest.mark.parametrize("change", [exchanged, written_into, cut])
def test_a_change_before_it_is_hashed(file: Path, change: Callable[[Path], None]) -> None:
    spec = spec_of(file)
    change(file)
    with pytest.raises(InputError, match=f"^{file}: expected (sha256|{len(CONTENTS)} bytes)"):
        begun(file, spec).check()
    with pytest.raises(InputError, match=f"^{file}: expected"):
        Seal().read(file, spec)


def test_what_stays_is_fine(file: Path) -> None:
    seal = begun(file)
    assert seal.read(file, spec_of(file)) == CONTENTS
    seal.check()
    file.read_bytes()
    os.utime(file.parent)
    seal.check()


def test_a_link_is_what_it_leads_to(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    seal = begun(link)
    seal.check()
    written_into(file)
    with pytest.raises(InputError, match="was changed"):
        seal.check()


def test_contents_are_read_up_to_a_size(tmp_path: Path) -> None:
    large = tmp_path / "graph.onnx"
    with large.open("wb") as opened:
        opened.truncate(PIECE + 1)  # takes no room
    with pytest.raises(InputError, match=f"expected at most {PIECE} bytes, found {PIECE + 1}"):
        Seal().read(large, FileSpec(PIECE + 1, ("0" * 64, "0" * 64)))


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_every_piece_counts(tmp_path: Path, piece: int) -> None:
    large = tmp_path / "weights.bin"
    with large.open("wb") as opened:
        opened.truncate(2 * PIECE + 10)
    spec = spec_of(large)
    assert len(spec.sha256) == 3
    with large.open("r+b") as opened:
        opened.seek(piece * PIECE + 5)
        opened.write(b"x")
    with pytest.raises(InputError, match="the file was changed"):
        begun(large, spec).check()
