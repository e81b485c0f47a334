"""Hashes of files, large ones in pieces on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

PIECE = 64 << 20
"""Bytes of a file that are hashed in one go."""


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def pieces_of(size: int) -> int:
    """How many pieces a file has; an empty one has one."""
    return max(1, -(-size // PIECE))


def sha256_of_pieces(path: Path) -> tuple[str, ...]:
    """Of every piece of a file, on all cores."""
    return begin_hashing(path)()


def begin_hashing(path: Path) -> Callable[[], tuple[str, ...]]:
    """Hash every piece of a file in threads, on all cores; what is returned waits for them.

    The threads end with the process, so that nobody waits for hashes that are not needed any more.

    Raises:
        OSError: it cannot be read; what is returned raises it too.
    """
    count = pieces_of(path.stat().st_size)
    found = [""] * count
    numbers = iter(range(count))

    def work() -> None:
        for number in numbers:
            found[number] = _digest(path, number)

    def begin() -> None:
        with contextlib.suppress(OSError):  # of which the one who waits is told
            work()

    threads = [threading.Thread(target=begin, daemon=True) for _ in range(min(count, os.cpu_count() or 1))]
    started = []
    with contextlib.suppress(RuntimeError):  # where the system refuses threads, the one who waits hashes
        for thread in threads:
            thread.start()
            started.append(thread)

    def wait() -> tuple[str, ...]:
        for thread in started:
            thread.join()
        for number in range(count):  # what a failed read left, or a fork
            found[number] = found[number] or _digest(path, number)
        return tuple(found)

    return wait


def _digest(path: Path, number: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        file.seek(number * PIECE)
        left = PIECE
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
