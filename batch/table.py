"""The table of a run, in Parquet: a line for every picture that is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from hart_runtime.batch.plan import Plan
from hart_runtime.common.files import whole_file

AT_ONCE = 10_000
"""Lines that are held while they are written."""


def write_table(file: Path, plan: Plan, lines: Mapping[int, Mapping[str, Any]]) -> None:
    """Write it, ordered by number.

    Args:
        lines: of the journal, by number.

    Raises:
        RunError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        {
            "number": pa.int64(),
            "row": pa.int64(),
            "prompt": text,
            "seed": pa.int64(),
            "settings": text,
            "file": text,
            "sha256": text,
            "seconds": pa.float64(),
            "error": text,
        }
    )
    records = _records(plan, lines)
    with whole_file(file) as stream, pq.ParquetWriter(stream, schema) as writer:
        while part := list(islice(records, AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, schema))


def _records(plan: Plan, lines: Mapping[int, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    settings = [json.dumps(asdict(one)) for one in plan.settings]
    for number in sorted(lines):
        picture = plan.pictures[number]
        yield {
            "number": number,
            "row": picture.row,
            "prompt": picture.prompt,
            "seed": picture.seed,
            "settings": settings[picture.settings],
            **{name: lines[number].get(name) for name in ("file", "sha256", "seconds", "error")},
        }
