"""Tar files of pictures, as webdataset reads them: what belongs to a picture has its name, and other endings.

A shard grows behind a hidden name and gets its own when it is full. Where its last whole picture ends is in
the journal, so that a run that was killed goes on behind it.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from hart_runtime.common.errors import RunError

SHARDS = "shards"
END = bytes(2 * tarfile.BLOCKSIZE)
"""What a tar file ends with."""


class Shards:
    """The shards of a folder, of which one grows."""

    def __init__(self, folder: Path, size: int) -> None:
        """``size``: pictures of a shard."""
        self.folder, self.size = folder / SHARDS, size
        self.index = self.count = self.end = 0
        """Of the shard that grows: its number, its pictures, its bytes."""
        self._stream: IO[bytes] | None = None

    def go_on(self, lines: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Begin behind what a journal holds; returns the numbers of pictures that are there."""
        counts, ends = Counter[int](), Counter[int]()
        for line in lines.values():
            if "shard" in line:
                counts[line["shard"]] += 1
                ends[line["shard"]] = max(ends[line["shard"]], line["end"])
        lost = {shard for shard in counts if not self._is_whole(shard, ends[shard])}
        if counts:
            last = max(counts)
            grows = self._growing(last).exists() and last not in lost
            self.index = last if grows else last + 1
            self.count, self.end = (counts[last], ends[last]) if grows else (0, 0)
        return {number for number, line in lines.items() if line.get("shard") not in lost}

    def add(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Append files of one name, by their endings; returns what the journal has to know.

        Raises:
            RunError: they cannot be written.
        """
        try:
            if self.count >= self.size:
                self.close(whole=True)
            if self._stream is None:
                self._open()
            assert self._stream is not None
            data = b"".join(map(_member, (f"{name}.{kind}" for kind in files), files.values()))
            self._stream.write(data)
        except OSError as error:
            raise RunError(f"{self.folder}: could not be written ({error.strerror})") from None
        self.count += 1
        self.end += len(data)
        first = next(iter(files))
        return {"file": f"{self._name(self.index)}/{name}.{first}", "shard": self.index, "end": self.end}

    def close(self, whole: bool) -> None:
        """``whole``: nothing will be added to the shard that grows, which then gets its name."""
        if whole and self.count:
            if self._stream is None:
                self._open()
            assert self._stream is not None
            self._stream.write(END)
            self._stream.close()
            self._growing(self.index).rename(self.folder / f"{self.index:06}.tar")
            self.index, self.count, self.end = self.index + 1, 0, 0
        elif self._stream is not None:
            self._stream.close()
        self._stream = None

    def _open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        growing = self._growing(self.index)
        growing.touch()
        os.truncate(growing, self.end)
        self._stream = growing.open("ab", buffering=0)

    def _is_whole(self, shard: int, end: int) -> bool:
        paths = (self.folder / f"{shard:06}.tar", self._growing(shard))
        return any(path.exists() and path.stat().st_size >= end for path in paths)

    def _growing(self, shard: int) -> Path:
        return self.folder / f".{shard:06}.tar.partial"

    @staticmethod
    def _name(shard: int) -> str:
        return f"{SHARDS}/{shard:06}.tar"


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
