"""Rows of a file of prompts, as they stand there: text, JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, first_line, known_names
from hart_runtime.common.json_files import parse_json
from hart_runtime.common.settings import KINDS
from hart_runtime.common.text_files import lines_of, read_text

PROMPT, LABEL, SEED, COUNT, PRESET, SPEED = "prompt", "label", "seed", "count", "preset", "speed"
GIVEN = IMAGE, MASK, OUTPAINT, VARY, ANEW, FIT, PASTE = (
    *("image", "mask", "outpaint", "vary", "anew", "fit", "paste"),
)
"""What is said of a picture that the row's are drawn from."""
COLUMNS = (PROMPT, LABEL, SEED, COUNT, PRESET, SPEED, *KINDS, *GIVEN)
"""What a row can hold: what is drawn, by one of two names, and what decides the picture beside it."""
Row = Mapping[str, Any]
"""Values by column, each as its file has it; None where the row leaves it out."""
_KINDS = {**KINDS, **dict.fromkeys((SEED, COUNT, VARY, ANEW), (int,)), PASTE: (bool,)}
"""Of columns that are no texts."""
_TRUTH = {"true": True, "false": False}


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        InputError: it cannot be read, or has a column that there is not, or none to draw; on the way.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"{file}: expected a file that ends in {' or '.join(READERS)}")
    return reader(file)


def _lines(file: Path) -> Iterator[Row]:
    """A prompt a line; empty lines are left out."""
    return ({PROMPT: line.strip()} for line in lines_of(read_text(file)) if line.strip())


def _objects(file: Path) -> Iterator[Row]:
    """A JSON object a line, whose keys may differ from line to line."""
    lines = (line for line in lines_of(read_text(file)) if line.strip())
    for number, line in enumerate(lines):
        place = f"{file}: row {number}"
        row = parse_json(line, place)
        _check_columns(place, row)
        yield row


def _records(file: Path) -> Iterator[Row]:
    """Comma-separated values, with a line of names before them; what is empty is left out."""
    reader = csv.DictReader(read_text(file).splitlines(keepends=True), strict=True)
    try:
        _check_columns(str(file), reader.fieldnames or ())
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                raise InputError(f"{file}: row {number}: expected {wanted} values, as in its first line")
            yield {name: _typed(name, text) if text.strip() else None for name, text in row.items()}
    except csv.Error as error:
        raise InputError(f"{file}: not readable as CSV, line {reader.line_num} ({error})") from None


def _typed(name: str, text: str) -> Any:
    """What a word stands for; one that stands for nothing is refused where values of any file are."""
    kinds = _KINDS.get(name, (str,))
    if bool in kinds:
        return _TRUTH.get(text.strip().lower(), text)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def _arrow(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: not a readable Parquet file ({first_line(error)})") from None
    with source:
        _check_columns(str(file), source.schema_arrow.names)
        try:
            for batch in source.iter_batches():
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{file}: not a readable Parquet file ({first_line(error)})") from None


def _check_columns(place: str, names: Iterable[str]) -> None:
    names = list(names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{place}: {twice[0]} stands there twice")
    known_names(place, names, COLUMNS)
    if (PROMPT in names) == (LABEL in names):
        raise InputError(f"{place}: expected {PROMPT} or {LABEL}, found {', '.join(names) or 'no column'}")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _records,
    ".parquet": _arrow,
}
