"""What is to be drawn, picture by picture: decided before anything is drawn or handed out.

A picture has a number, its place among those of all rows in their order. Where a row names no seed the number
is the seed, so that pictures do not depend on who draws them, when, or with what.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hart_runtime.batch.rows import COUNT, LABEL, PRESET, PROMPT, SEED, SPEED, Row
from hart_runtime.batch.sources import Given, GivenPictures
from hart_runtime.common.errors import InputError, shown, told_of, whole_in_range
from hart_runtime.common.settings import KINDS, SamplingSettings
from hart_runtime.runtime.call import MAX_IMAGES, MAX_SEED, checked_settings, words_of
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture."""

    number: int
    row: int
    """Of the file, counted from 0."""
    prompt: str
    """Or the full name of a class; what stands there if it cannot be drawn."""
    seed: int
    settings: int
    """Which of the plan's."""
    error: str | None = None
    """Why it cannot be drawn."""
    source: int | None = None
    """Which of the plan's given pictures it starts from."""


@dataclass(frozen=True)
class Plan:
    """All pictures of a run, by number."""

    pictures: list[Picture]
    settings: list[SamplingSettings]
    """Those that differ."""
    sources: list[Given]
    """Pictures that are given, those that differ."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of everything that decides the pictures but the bundle."""
        digest = hashlib.sha256(json.dumps([asdict(settings) for settings in self.settings]).encode())
        digest.update(json.dumps([asdict(given.told) for given in self.sources]).encode())
        for picture in self.pictures:
            told = [
                picture.row,
                picture.prompt,
                picture.seed,
                picture.settings,
                picture.error,
                picture.source,
            ]
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()


def make_plan(
    rows: Iterable[Row],
    source: Path,
    manifest: Manifest,
    classes: ClassNames | None = None,
    seed: int = 0,
    count: int = 1,
    **given: Any,
) -> Plan:
    """Decide all pictures of some rows.

    A prompt that cannot be drawn is its picture's error, and stops no other.

    Args:
        source: of the rows; begins messages, and paths in rows begin in its folder.
        seed: of picture 0 of rows that name none; that of picture i is ``seed + i``.
        count: pictures of rows that name none.
        given: preset, speed and settings, which those of a row replace.

    Raises:
        InputError: there are no rows, or the seed, the count, a setting or a given picture of one cannot be
            used.
    """
    whole_in_range(COUNT, count, 1, MAX_IMAGES)
    checked_settings(manifest, None, seed, **given)
    known, sources = _Settings(manifest, given), GivenPictures(source.parent, manifest.model)
    pictures: list[Picture] = []
    for number, row in enumerate(rows):
        with told_of(f"{source}: row {number}"):
            index = known.number(row)
            pieces = whole_in_range(COUNT, _value(row, COUNT, count), 1, MAX_IMAGES)
            first = _value(row, SEED, seed + len(pictures))
            first = whole_in_range(SEED, first, 0, MAX_SEED - pieces + 1)
            prompt, error = _drawn(row, classes, manifest)
            start = sources.number(row)
        for i in range(pieces):
            pictures.append(Picture(len(pictures), number, prompt, first + i, index, error, start))
    if not pictures:
        raise InputError(f"{source}: holds no prompt")
    return Plan(pictures, [*known.numbers], sources.found)


class _Settings:
    """Settings of rows, those that are alike checked once."""

    def __init__(self, manifest: Manifest, given: Mapping[str, Any]) -> None:
        self.manifest, self.given = manifest, given
        self.numbers: dict[SamplingSettings, int] = {}
        self._seen: dict[str, int] = {}

    def number(self, row: Row) -> int:
        own = {
            name: _as_typed(name, row[name]) for name in (PRESET, SPEED, *KINDS) if row.get(name) is not None
        }
        key = repr(own)
        if key not in self._seen:
            found = checked_settings(self.manifest, None, **{**self.given, **own})
            self._seen[key] = self.numbers.setdefault(found, len(self.numbers))
        return self._seen[key]


def _as_typed(name: str, value: Any) -> Any:
    """A whole number where any will do, as an option of a command line is read: 3 is 3.0."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in KINDS.get(name, ()) else value


def _value(row: Row, name: str, default: int) -> Any:
    found = row.get(name)
    return default if found is None else found


def _drawn(row: Row, classes: ClassNames | None, manifest: Manifest) -> tuple[str, str | None]:
    """What a row asks for, and why it cannot be drawn."""
    if classes is None and LABEL in row:
        raise InputError(f"{LABEL}: {manifest.name} draws texts and has no classes; expected {PROMPT}")
    asked = row.get(PROMPT, row.get(LABEL))
    if asked is None or (isinstance(asked, str) and not asked.strip()):
        return "", "the prompt is empty"
    try:
        (prompt,) = words_of([asked], classes)
        if not isinstance(prompt, str):
            raise InputError(f"expected text, found {shown(prompt)}")
        prompt.encode()
    except InputError as error:
        return str(asked), str(error).replace("`", "")
    except UnicodeEncodeError:
        return prompt.encode(errors="replace").decode(), "the prompt is not valid UTF-8"
    return prompt, None


def alike(picture: Picture) -> tuple[int, bool]:
    """What pictures have in common that are drawn at once: settings, and whether they start from others."""
    return picture.settings, picture.source is not None


def in_batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures that are alike and follow each other, so many at the most."""
    part: list[Picture] = []
    for picture in pictures:
        if part and (len(part) == size or alike(part[0]) != alike(picture)):
            yield part
            part = []
        part.append(picture)
    if part:
        yield part
