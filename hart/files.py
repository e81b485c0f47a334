"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hart.errors import InputError, RunError


@contextlib.contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """A new folder next to ``output`` to write into; removed in the end, whatever happens.

    :func:`move_into_place` gives it the final name.

    Raises:
        InputError: the place cannot be written.
        RunError: writing failed on the way, such as on a full disk.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        partial.chmod(0o755)
        yield partial
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(partial):
            raise
        raise RunError(f"{output}: could not be written ({error.strerror}); nothing was changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, output: Path) -> None:
    """Rename ``partial`` to ``output``, replacing a folder there; the old one stays if that fails."""
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
