"""Sizes of networks whose files hold no configuration, read from the names and shapes of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hart_runtime.common.errors import InputError, shown
from hart_runtime.common.weight_files import is_averaged
from hart_runtime.hart.weights import Stored


class Shapes:
    """Shapes of tensors that a network cannot be without."""

    def __init__(self, file: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self.file, self.shapes = file, shapes

    def of(self, name: str, dimensions: int) -> Sequence[int]:
        shape = self.shapes.get(name)
        if shape is None or len(shape) != dimensions or 0 in shape:
            found = "none" if shape is None else list(shape)
            raise InputError(f"{self.file}: {name}: expected {dimensions} dimensions above 0, found {found}")
        return shape


def named_below(
    entries: Sequence[Stored],
    sign: str,
    file: Path,
    what: str,
    choose: Callable[[list[str]], str] | None = None,
) -> dict[str, Stored]:
    """Tensors of one network by the names it has for them, of whatever else is in the file.

    Args:
        sign: a name that only this network has.
        what: names it in the message.
        choose: which of several sets is meant, by the keys that they lie below, where one is averaged.

    Raises:
        InputError: no tensor is called so, or several are and no rule says which.
    """
    prefixes = {e.name.removesuffix(sign) for e in entries if f".{e.name}".endswith(f".{sign}")}
    if choose is not None and len(prefixes) > 1 and any(map(is_averaged, prefixes)):
        sets = {prefix.rstrip("."): prefix for prefix in sorted(prefixes)}
        prefixes = {sets[choose([*sets])]}
    if len(prefixes) != 1:
        places = " and ".join(shown(prefix.rstrip(".")) for prefix in sorted(prefixes))
        found = f"{len(prefixes)}, below {places}" if prefixes else "none"
        raise InputError(f"{file}: expected {what}, which has one {sign}, found {found}")
    (prefix,) = prefixes
    return {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}


def count_of(names: Mapping[str, object], before: str, after: str = "") -> int:
    """One more than the largest number that names have between these parts."""
    pattern = re.compile(rf"{before}(\d{{1,9}})\.{after}")  # of any length, it would not be a number
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)
