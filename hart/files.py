"""Results appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hart.errors import InputError


def refuse_existing(output: Path) -> None:
    """Refuse a folder that is there already, before anything is computed for it."""
    if output.exists():
        raise InputError(f"--output {output}: exists already, and is not replaced; give another")


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends well.

    Raises:
        InputError: ``output`` exists, or its parent cannot be written.
    """
    refuse_existing(output)
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
