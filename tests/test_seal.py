"""What was hashed is what is used: files that change, or are exchanged, while a bundle is opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hart_runtime.common.errors import InputError
from hart_runtime.common.hashing import PIECE
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, describe_files, open_bundle
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.manifest import FileSpec
from hart_runtime.runtime.pipeline import Pipeline
from hart_runtime.runtime.seal import Seal
from hart_runtime.runtime.text import open_tokenizer

CONTENTS = b"weights of a network" * 1000
CHANGED = "was changed while the bundle was opened; try again"


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
    with pytest.raises(InputError, match=rf"^{file}: {CHANGED}$"):
        seal.check()
    with pytest.raises(InputError, match=rf"^{file}: {CHANGED}$"), seal.open(file):
        pass


def linked(file: Path) -> None:
    """As backups do; the system notes it as a change of the file."""
    file.with_name("backup").hardlink_to(file)


def copied_over(file: Path) -> None:
    """By the same contents."""
    same = file.with_name("same")
    same.write_bytes(CONTENTS)
    same.replace(file)


@pytest.mark.parametrize("touch", [linked, copied_over, led_elsewhere, os.utime, Path.read_bytes])
def test_what_was_touched_is_hashed_again_for_who_opens_more(
    file: Path, touch: Callable[[Path], object]
) -> None:
    seal = begun(file)
    seal.check()
    touch(file)
    seal.renew()
    seal.check()


@pytest.mark.parametrize("change", [exchanged, written_into, cut, Path.unlink])
def test_what_was_changed_is_not_opened_later(file: Path, change: Callable[[Path], None]) -> None:
    seal = begun(file)
    seal.check()
    change(file)

    def renewed() -> None:
        seal.renew()
        seal.check()

    with pytest.raises(InputError, match=f"^{file}: (expected (sha256|{len(CONTENTS)} bytes)|missing)"):
        renewed()


@pytest.mark.parametrize("change", [exchanged, written_into, cut])
def test_a_change_before_it_is_hashed(file: Path, change: Callable[[Path], None]) -> None:
    spec = spec_of(file)
    change(file)
    with pytest.raises(InputError, match=f"^{file}: expected (sha256|{len(CONTENTS)} bytes)"):
        begun(file, spec).check()
    with pytest.raises(InputError, match=f"^{file}: expected"):
        Seal().read(file, spec)
    seal = Seal()
    assert not seal.matches(file, spec)
    seal.check()  # what is none of the bundle's may change


def test_what_stays_is_fine(file: Path) -> None:
    seal = begun(file)
    with seal.open(file) as opened:
        assert opened.read() == CONTENTS
    assert seal.matches(file, spec_of(file))
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


@pytest.mark.parametrize("name", [TEXT_TOKENIZER, WEIGHTS, "decoder.onnx", "text_encoder.onnx"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_file_before_libraries_open_it(
    demo_bundle: Path, tmp_path: Path, name: str, backend: str
) -> None:
    """The tokenizer's bytes are handed on; what is opened by its path is noticed."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    bundle = open_bundle(folder, wait=False)
    assert (folder / name).is_file()
    other = tmp_path / "other"
    shutil.copy(folder / name, other)
    if name == TEXT_TOKENIZER:
        other.write_text(other.read_text().replace("circle", "square"))
    other.replace(folder / name)
    if name == TEXT_TOKENIZER:
        expected = open_tokenizer(open_bundle(demo_bundle))(["a red circle"])[0]
        assert np.array_equal(open_tokenizer(bundle)(["a red circle"])[0], expected)
    with pytest.raises(InputError, match=f"{name}: {CHANGED}"):
        open_backend(bundle, backend=backend)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backup_of_a_bundle_that_is_open(demo_bundle: Path, tmp_path: Path, backend: str) -> None:
    """Graphs that are opened when they are first asked for open then, too."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    pipeline = Pipeline.load(folder, device="cpu", backend=backend)
    for name in (WEIGHTS, "fast_transformer.onnx"):
        (tmp_path / f"backup-{name}").hardlink_to(folder / name)
    assert pipeline.generate("a red circle", prune=True).images
