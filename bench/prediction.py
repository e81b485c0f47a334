"""What ``hart-bench scale`` predicts, and its file, which is there before anything is measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hart_runtime.common.errors import InputError
from hart_runtime.common.files import whole_file
from hart_runtime.common.json_files import read_json
from hart_runtime.common.records import read_record


@dataclass(frozen=True)
class Row:
    """Of a number of workers."""

    workers: int
    most_workers: int
    rate: float
    """Requests a second."""
    batch: int
    seconds: float
    warm_up: float
    """Of these seconds, those that nothing is told of."""
    runs: int
    """That are told of together; the moments of run ``i`` are ``arrivals(rate, i)``."""
    pictures_per_second: float
    p50: float
    p99: float
    refused: int
    again: int
    busy: float
    mean_workers: float
    network_gbit: float
    storage_tb_a_day: float
    price_of_1000: float | None = None


@dataclass(frozen=True)
class Prediction:
    """Everything in the file."""

    result: str
    """The ``bench.json`` that it was made from."""
    measured: str
    """When that was."""
    date: str
    """When it was predicted."""
    rows: tuple[Row, ...]


def write_prediction(prediction: Prediction, file: Path) -> None:
    with whole_file(file) as stream:
        stream.write((json.dumps(asdict(prediction), indent=1, allow_nan=False) + "\n").encode())


def read_prediction(file: Path) -> Prediction:
    """Raises InputError: it is none."""
    try:
        return read_record(Prediction, read_json(file), str(file))
    except InputError as error:
        raise InputError(f"{error}; predict again") from None
