"""Where pictures go, and what may not be replaced by them."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from hart_runtime.common.errors import NOTE, InputError
from hart_runtime.common.files import resolved

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("out.png")


def places(output: Path | None, count: int) -> list[Path]:
    """Where pictures go: nothing is replaced by a command that names no place."""
    if output is not None:
        return _paths(output, count)
    names = itertools.chain([DEFAULT_OUTPUT.stem], (f"{DEFAULT_OUTPUT.stem}-{n}" for n in itertools.count(2)))
    tries = (_paths(DEFAULT_OUTPUT.with_stem(name), count) for name in names)
    return next(paths for paths in tries if not any(os.path.lexists(path) for path in paths))


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def refuse_inputs(paths: list[Path], bundle: Path, *inputs: Path | None) -> None:
    """A picture must not replace what it is drawn from, by whatever name, nor lie in the bundle."""
    read = {resolved(file) for file in inputs if file is not None}
    for path in paths:
        if resolved(path) in read:
            raise InputError(f"{path}: is what is read, and would be replaced; give another `output`")
        if resolved(path).is_relative_to(resolved(bundle)):
            raise InputError(f"{path}: lies in the bundle, which holds no other files; give another `output`")


def tell_replaced(paths: list[Path]) -> None:
    if there := [path for path in paths if path.exists()]:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        log.log(NOTE, "%s%s: there already, replaced when drawn", there[0], more)
