"""The files of a bundle that are hashed are the ones that are used.

Large weights are hashed while the graphs are loaded. Libraries open graphs and weights by their path, so
a file might be another one by then: what the system says of it is compared before it is hashed and after
everything is open.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hart_runtime.common.errors import InputError
from hart_runtime.common.hashing import PIECE, begin_hashing, sha256_of_pieces
from hart_runtime.common.text_files import not_the_file
from hart_runtime.runtime.manifest import FileSpec

CHANGED = "was changed while the bundle was opened; try again"
START = 1024
"""Bytes of a file that tell what else it is."""


class Seal:
    """What was hashed, and what is being hashed."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, ...]] = {}
        self._sealed: dict[Path, FileSpec] = {}
        self._coming: list[tuple[Path, FileSpec, Callable[[], tuple[str, ...]]]] = []

    def read(self, path: Path, expected: FileSpec) -> bytes:
        """The contents of a small file, of which these very bytes were hashed.

        Raises:
            InputError: they are not what was sealed.
            OSError: it cannot be read.
        """
        self._see(path, expected)
        if expected.size > PIECE:
            raise InputError(f"{path}: expected at most {PIECE} bytes, found {expected.size}; refused")
        data = path.read_bytes()
        _compare(path, expected, (hashlib.sha256(data).hexdigest(),))
        return data

    def begin(self, path: Path, expected: FileSpec) -> None:
        """Hash a file of any size while other work is done; raises as :meth:`read`, but for its contents."""
        self._see(path, expected)
        self._coming.append((path, expected, begin_hashing(path)))

    def matches(self, path: Path, expected: FileSpec) -> bool:
        """Hash a file of any size now; one that is what was expected belongs to what is sealed from then on.

        Raises:
            OSError: it cannot be read.
        """
        told = _told(path)
        found = told[2] == expected.size and sha256_of_pieces(path) == expected.sha256
        if found:
            self._seen[path], self._sealed[path] = told, expected
        return found

    def open(self, path: Path) -> BinaryIO:
        """A file that was hashed, for who does not open it by its path.

        Raises:
            InputError: another one lies there by now, or it was changed.
        """
        with contextlib.suppress(OSError):
            file = path.open("rb")
            if _told(file.fileno()) == self._seen[path]:
                return file
            file.close()
        raise InputError(f"{path}: {CHANGED}")

    def renew(self) -> None:
        """Begin to hash again what was touched since, by a backup say, for who opens more of it later.

        Raises:
            InputError: a file is not there any more, or of another size.
        """
        for path in self._touched():
            self.begin(path, self._sealed[path])

    def check(self) -> None:
        """Wait for the hashes, and see that no file changed since its own was begun.

        Raises:
            InputError: one is not what was sealed, or was changed meanwhile.
        """
        for path, expected, hashes in self._coming:
            try:
                _compare(path, expected, hashes())
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        self._coming.clear()
        for path in self._touched():
            raise InputError(f"{path}: {CHANGED}")

    def _touched(self) -> list[Path]:
        """Files that are not there any more as they were seen."""
        found = []
        for path, before in self._seen.items():
            try:
                same = _told(path) == before
            except OSError:
                same = False
            if not same:
                found.append(path)
        return found

    def _see(self, path: Path, expected: FileSpec) -> None:
        if not path.is_file():
            raise InputError(f"{path}: missing from the bundle; export it again")
        self._seen[path] = told = _told(path)
        self._sealed[path] = expected
        if told[2] != expected.size:
            with path.open("rb") as stream:
                other = not_the_file(stream.read(START))
            if other:
                raise InputError(f"{path}: {other}")
            raise InputError(
                f"{path}: expected {expected.size} bytes, found {told[2]}; the file is "
                f"truncated or was changed, export the bundle again"
            )


def _told(path: Path | int) -> tuple[int, ...]:
    """What tells one file from another, and one state of it from the next."""
    status = os.stat(path)  # noqa: PTH116 - the same for a link to it
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _compare(path: Path, expected: FileSpec, hashes: tuple[str, ...]) -> None:
    for wanted, found in zip(expected.sha256, hashes, strict=True):
        if found != wanted:
            raise InputError(
                f"{path}: expected sha256 {wanted[:12]}..., found {found[:12]}...; "
                f"the file was changed, export the bundle again"
            )
