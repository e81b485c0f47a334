"""Results appear whole or not at all, and what a user has put beside them stays."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hart_runtime.common.errors import NO_ROOM, NOTE, InputError, RunError, listed, parameter

log = logging.getLogger(__name__)

PARTIAL, ASIDE = ".partial", ".aside"
"""Ends of hidden names beside an output: what is being written, and what it replaces."""
LEFT = re.compile(r"\.(.+)-[0-9a-f]{8}(\.partial|\.aside)")
LONGEST = 60
"""Characters of an output's name that the hidden names repeat."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
Owned = Callable[[Path], bool]
"""Whether a file, by its path in a folder, is the command's own, and may go when the folder is replaced."""


def resolved(path: Path) -> Path:
    """Where links lead, if anywhere: ``Path.resolve`` raises RuntimeError for circles before Python 3.13."""
    return Path(os.path.realpath(path))


def read_regular(file: Path) -> bytes:
    """All of a file that ends: a FIFO or a device may have no end, and never begin.

    Raises:
        OSError: it is none, or cannot be read.
    """

    def without_waiting(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)

    # An opener, since what it opened is closed again where it turns out to be a folder.
    with open(file, "rb", opener=without_waiting) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(file))
        return opened.read()


def refuse_existing(output: Path) -> None:
    """Refuse a folder that is there already, before anything is computed for it."""
    if os.path.lexists(output):
        raise InputError(f"{parameter('output', output)}: exists already, and is not replaced; give another")


def refuse_strangers(folder: Path, owned: Owned) -> None:
    """Refuse to replace a folder in which a user has put something, or in which the user is.

    Raises:
        InputError: with what would be lost.
    """
    folder = resolved(folder)
    if Path.cwd().is_relative_to(folder):
        raise InputError(f"{folder}: is the folder you are in, which cannot be replaced; go to another")
    strangers = sorted(_strangers(folder, owned))
    if strangers:
        raise InputError(f"{folder}: holds {listed(strangers)}, which would be lost; move it elsewhere")


def _strangers(folder: Path, owned: Owned) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not _left(name)]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            if not _left(name) and not owned(path := (here / name).relative_to(folder)):
                yield str(path)
        if not folders and not files and here != folder:
            yield f"{here.relative_to(folder)}/"


def _left(name: str) -> bool:
    return LEFT.fullmatch(name) is not None


@contextlib.contextmanager
def whole_folder(output: Path, owned: Owned | None = None) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends well.

    Otherwise it is removed, and what was at ``output`` before is there still. A link is followed.

    Args:
        owned: for a folder that may be replaced; it then holds nothing else.

    Raises:
        InputError: ``output`` exists (without ``owned``) or holds something else, or its parent cannot be
            written.
        RunError: writing failed on the way, such as on a full disk.
    """
    _check_place(output, owned)
    target = resolved(output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        partial, lock = _claim(target, folder=True)
    except OSError as error:
        raise _unwritable(str(output), error) from None
    try:
        yield partial
        _check_place(output, owned)  # it may have changed meanwhile
        _move_into_place(partial, target)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(partial):
            raise
        raise RunError(f"{output}: could not be written ({error.strerror}); nothing was changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _check_place(output: Path, owned: Owned | None) -> None:
    if owned is None:
        refuse_existing(output)
    elif output.is_dir():
        refuse_strangers(output, owned)
    elif os.path.lexists(output):
        raise InputError(f"{output}: expected a folder, found another thing, not replaced")


@contextlib.contextmanager
def whole_file(output: Path) -> Iterator[BinaryIO]:
    """The same for a file: what is written gets its name at the end. One that is replaced hands its mode on.

    Raises:
        InputError: as :func:`check_output`.
        RunError: it cannot be written.
    """
    check_output(output)
    target = resolved(output)
    try:
        partial, lock = _claim(target, folder=False)
        try:
            with open(lock, "wb", closefd=False) as file:
                yield file
            if target.exists():
                os.fchmod(lock, stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        raise RunError(f"{output}: could not be written ({error.strerror or error})") from None


def check_output(output: Path, said: str | None = None) -> None:
    """Refuse a file that cannot be written or must not be replaced, before the work is done.

    Links are followed. What is no regular file, such as a FIFO or a device, has a reader that a new file
    would not reach.

    Args:
        said: begins messages; the path if left out.

    Raises:
        InputError: with what is there.
        RunError: there is no room for it.
    """
    said = said or str(output)
    try:
        target = output.resolve()
        if target.is_dir():
            raise InputError(f"{said}: expected a file, found a folder")
        if not target.parent.is_dir():
            raise InputError(f"{said}: the folder {target.parent} does not exist")
        if target.exists() and not target.is_file():
            raise InputError(f"{said}: expected a file, found a device or a FIFO, not replaced")
        if target.exists() and not target.stat().st_mode & 0o222:
            raise InputError(f"{said}: is write-protected, not replaced")
        partial, lock = _claim(target, folder=False)
        partial.unlink(missing_ok=True)
        os.close(lock)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise _unwritable(said, error) from None


def _unwritable(said: str, error: OSError | RuntimeError) -> InputError | RunError:
    kind = RunError if getattr(error, "errno", None) in NO_ROOM else InputError
    return kind(f"{said}: cannot be written ({getattr(error, 'strerror', None) or error})")


def clear_leftovers(output: Path) -> None:
    """Remove what runs left beside ``output`` that were killed; one that goes on holds a lock.

    What such a run had moved aside and could not replace comes back. Outputs that are numbered begin alike.
    """
    for path in output.parent.glob(f".{glob.escape(output.stem[:LONGEST])}*"):
        found = LEFT.fullmatch(path.name)
        if found is None:
            continue
        if found[2] == ASIDE and found[1] == output.name[:LONGEST] and not os.path.lexists(output):
            path.rename(output)
            log.log(NOTE, "%s: is there again, a run that was killed had moved it aside", output)
            continue
        with contextlib.suppress(OSError), _opened(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            log.log(NOTE, "%s: removed, a run that was killed had left it", path)


def _claim(target: Path, folder: bool) -> tuple[Path, int]:
    """A new hidden file or folder beside ``target``, with the user's own permissions, and its lock.

    The system takes the lock back when the process ends, however it ends.
    """
    while True:
        partial = target.with_name(f".{target.name[:LONGEST]}-{secrets.token_hex(4)}{PARTIAL}")
        if folder:
            partial.mkdir()
        else:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        lock = os.open(partial, os.O_RDONLY if folder else os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # who clears up was faster
            os.close(lock)
            continue
        except OSError:  # a disk without locks: nobody clears up there
            pass
        return partial, lock


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename; where a folder is replaced, both change names at once, so that one of them is always there."""
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        aside = partial.with_suffix(ASIDE)
        target.rename(aside)
        try:
            partial.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether this system and this disk can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )
