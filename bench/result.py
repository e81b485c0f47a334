"""What a benchmark found, and ``bench.json``, which says it to programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hart_runtime.bench.against import Comparison
from hart_runtime.bench.fresh import FirstPicture
from hart_runtime.bench.machine import Company, Facts
from hart_runtime.bench.peak import Peak
from hart_runtime.bench.samples import Samples
from hart_runtime.common.errors import InputError
from hart_runtime.common.json_files import read_json
from hart_runtime.common.records import read_record

SCHEMA_VERSION = 1
RESULT_FILE = "bench.json"


@dataclass(frozen=True)
class Latency:
    """Prompt in, PNG-ready pixels out, for a batch of pictures."""

    batch: int
    seconds: Samples
    pictures_per_second: float


@dataclass(frozen=True)
class StageResult:
    """One stage of a picture. Shares are of the device's measured peak."""

    name: str
    seconds: Samples
    """In its graphs, uploads and waiting included."""
    host: Samples
    """On the host just before its graphs."""
    operations: float | None
    bytes: float | None
    """Counted; None where the bundle does not say enough, or nothing is counted."""
    operations_share: float | None
    bytes_share: float | None
    floor: float | None
    """Seconds the stage would take at the measured peak."""


@dataclass(frozen=True)
class Breakdown:
    """A picture cut into stages, in runs of their own."""

    batch: int
    wall: Samples
    stages: tuple[StageResult, ...]
    """The last one, "host", is what the host does after the last graph."""
    graphs: dict[str, Samples]
    """Seconds a picture spends in each graph, and outside of them ("host")."""


@dataclass(frozen=True)
class Result:
    """Everything in ``bench.json``."""

    date: str
    bundle: dict[str, Any]
    """Name, identity, precision, sampling settings, and where a picture starts."""
    device: str
    backend: str
    threads: int | None
    machine: Facts
    before: Facts
    after: Facts
    company: Company
    first_pictures: tuple[FirstPicture, ...]
    """One per fresh process."""
    peak: Peak
    latency: tuple[Latency, ...]
    breakdown: Breakdown
    against: tuple[Comparison, ...]
    encoder: StageResult | None = None
    """Of a picture that is given; None where a bundle takes none."""
    schema: int = SCHEMA_VERSION


def write_result(result: Result, folder: Path) -> None:
    """Write ``bench.json``."""
    text = json.dumps(asdict(result), indent=1, allow_nan=False) + "\n"
    (folder / RESULT_FILE).write_text(text, encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Read a ``bench.json``, or that of a result folder, as plain values.

    Raises:
        InputError: not a result, or of a newer schema, or a damaged one.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    values = read_json(file)
    found = values.get("schema")
    if type(found) is not int or found < 1 or "breakdown" not in values:
        raise InputError(f"{file}: not a result of hart-bench, expected a schema and a breakdown")
    if found > SCHEMA_VERSION:
        raise InputError(
            f"{file}: schema {found} is newer than the {SCHEMA_VERSION} this version reads; "
            f"upgrade hart-runtime"
        )
    try:
        result = read_record(Result, values, str(file))
    except InputError as error:
        raise InputError(f"{error}; measure again") from None
    if not result.first_pictures:
        raise InputError(f"{file}: first_pictures: expected at least one, found none; measure again")
    return values
