"""Pictures that rows start from: verified before anything is drawn, and read again when it is their turn.

What is held of each in between is its hash and its mask, since together they may be more than fits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hart_runtime.batch.rows import GIVEN, IMAGE, MASK, OUTPAINT, Row
from hart_runtime.common.errors import InputError, shown
from hart_runtime.runtime.picture_record import PictureRecord, record_of, source_again
from hart_runtime.runtime.pictures import Source, margins_of, source_of
from hart_runtime.runtime.spec import ModelSpec

Read = Callable[[int], Source]
"""Reads a given picture of a plan, by its place there; raises InputError if it is another one by now."""


@dataclass(frozen=True)
class Given:
    """A picture that others are drawn from."""

    file: Path
    told: PictureRecord
    """What of it is drawn; with its hash, so that nothing is drawn of another."""


class GivenPictures:
    """Those of rows, of which those that are alike are read once."""

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        """``folder``: where paths of rows begin."""
        self.folder, self.model = folder, model
        self.found: list[Given] = []
        self._seen: dict[str, int] = {}

    def number(self, row: Row) -> int | None:
        """Which of them a row starts from; None for one that starts from nothing.

        Raises:
            InputError: it cannot be read, or what is said of it cannot be done.
        """
        own = {name: row[name] for name in GIVEN if row.get(name) is not None}
        if not own:
            return None
        if IMAGE not in own:
            raise InputError(f"`{next(iter(own))}`: there is no picture; give one with `image`")
        key = repr(own)
        if key not in self._seen:
            self.found.append(self._given(own))
            self._seen[key] = len(self.found) - 1
        return self._seen[key]

    def _given(self, own: dict[str, Any]) -> Given:
        image, mask = (self._path(name, own.pop(name, None)) for name in (IMAGE, MASK))
        assert image is not None
        if isinstance(own.get(OUTPAINT), str):
            own[OUTPAINT] = margins_of(own[OUTPAINT])
        return Given(image, record_of(source_of(self.model, image, mask, **own)))

    def _path(self, name: str, value: Any) -> Path | None:
        if value is not None and not isinstance(value, str):
            raise InputError(f"`{name}`: expected a path, found {shown(value)}")
        return None if value is None else self.folder / value


def read_here(given: Sequence[Given], model: ModelSpec) -> Read:
    """What reads them from this machine's disk."""
    return lambda number: source_again(given[number].told, model, given[number].file)
