"""Results appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from hart_runtime.common.errors import InputError, RunError, parameter

PIECE = 64 << 20
"""Bytes of a file that are hashed in one go: large files by several threads at once."""


def refuse_existing(output: Path) -> None:
    """Refuse a folder that is there already, before anything is computed for it."""
    if output.exists():
        raise InputError(f"{parameter('output', output)}: exists already, and is not replaced; give another")


@contextlib.contextmanager
def whole_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends well.

    Otherwise it is removed, and what was at ``output`` before is there still.

    Raises:
        InputError: ``output`` exists (without ``replace``), or its parent cannot be written.
        RunError: writing failed on the way, such as on a full disk.
    """
    if not replace:
        refuse_existing(output)
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        partial.chmod(0o755)
        _move_into_place(partial, output)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(partial):
            raise
        raise RunError(f"{output}: could not be written ({error.strerror}); nothing was changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, output: Path) -> None:
    """Rename; a folder that is replaced comes back if that fails."""
    if not output.exists():
        partial.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.rename(aside / output.name)
    try:
        partial.rename(output)
    except BaseException:
        (aside / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
    for thread in threads:
        thread.start()

    def wait() -> tuple[str, ...]:
        for thread in threads:
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
