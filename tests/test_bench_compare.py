"""What comparing two results of the benchmark says, and what it cannot say."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hart_runtime.bench.against import Comparison
from hart_runtime.bench.cli import main
from hart_runtime.bench.compare import CONDITIONS, compare, different_conditions, is_change
from hart_runtime.bench.fresh import FirstPicture
from hart_runtime.bench.machine import Company
from hart_runtime.bench.peak import Peak
from hart_runtime.bench.result import Breakdown, Latency, StageResult
from hart_runtime.bench.result import Result as BenchResult
from hart_runtime.bench.samples import Samples

Values = dict[str, Any]
FOUR = Samples.of([1.0] * 4)
RESULT: Values = json.loads(
    json.dumps(
        asdict(
            BenchResult(
                date="2026",
                bundle={
                    "identity": "a",
                    "precision": "fp32",
                    "image_size": 64,
                    "sampling": {},
                    "starts_at": "x",
                },
                device="cpu",
                backend="onnxruntime",
                threads=2,
                machine={
                    "cpu": "x",
                    "cores": 2,
                    "libraries": {"numpy": "2"},
                    "python": "3",
                    "system": "Linux",
                },
                before={},
                after={},
                company=Company(cores=2),
                first_pictures=(
                    FirstPicture(**dict.fromkeys((field.name for field in fields(FirstPicture)), 1)),
                ),
                peak=Peak(1.0, 1.0),
                latency=(Latency(1, FOUR, 1.0), Latency(4, FOUR, 1.0)),
                breakdown=Breakdown(
                    1, FOUR, (StageResult("decoder", FOUR, FOUR, *[None] * 5),), {"transformer": FOUR}
                ),
                against=(Comparison("torch-eager", FOUR, FOUR, FOUR, 1.0, None),),
            )
        )
    )
)


def held(values: Values, path: tuple[str, ...]) -> Values:
    found: Values = functools.reduce(dict.__getitem__, path, values)
    return found


def told(*results: Values, folder: Path) -> str:
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, values in zip(files, results, strict=True):
        file.write_text(json.dumps(values))
    done = CliRunner().invoke(main, ["compare", *map(str, files)])
    assert done.exit_code == 0, done.output
    return str(done.stdout)


@pytest.mark.parametrize("name", CONDITIONS)
def test_other_conditions(tmp_path: Path, name: str) -> None:
    other = copy.deepcopy(RESULT)
    *path, last = CONDITIONS[name]
    place = held(other, tuple(path))
    place[last] = 77 if isinstance(place.get(last), int) else {"b": 1} if last == "libraries" else "another"
    assert "note: " not in told(RESULT, RESULT, folder=tmp_path)
    lines = told(RESULT, other, folder=tmp_path).splitlines()
    assert [line.startswith(f"note: {name}: ") for line in lines] == [True, False]


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (("latency",), "batch 1, batch 4"),
        (("against",), "torch-eager: ratio"),
        (("breakdown", "stages"), "decoder, decoder, host"),
        (("breakdown", "graphs"), "graph transformer"),
    ],
)
def test_quantities_of_one_result_alone(place: tuple[str, ...], names: str) -> None:
    other = copy.deepcopy(RESULT)
    *path, last = place
    found = held(other, tuple(path))
    found[last] = type(found[last])()
    assert different_conditions(RESULT, other) == [f"only in the first: {names}"]
    assert different_conditions(other, RESULT) == [f"only in the second: {names}"]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (3, 9), (4, 2)])
def test_too_few_samples_are_no_judgement(tmp_path: Path, before: int, after: int) -> None:
    results = [copy.deepcopy(RESULT) for _ in range(2)]
    for values, count, seconds in zip(results, (before, after), (1.0, 100.0), strict=True):
        values["first_pictures"] *= 4
        values["latency"][0]["seconds"]["values"] = [seconds] * count
    (change,) = [change for change in compare(*results) if change.name == "batch 1"]
    assert change.few
    said = told(*results, folder=tmp_path)
    assert re.search(r"^0 of \d+ quantities changed; 1 could not be judged, of fewer than 4 samples: ", said)
    assert "batch 1" not in said


def test_noise_is_not_a_change() -> None:
    assert is_change([1.0, 1.1, 1.05, 1.0], [0.8, 0.9, 0.85, 0.8])
    assert not is_change([1.0, 1.1, 1.05, 1.0], [1.02, 1.08, 1.04, 1.0])
    assert not is_change([1.0] * 4, [1.005] * 4)  # certain, but tiny
    assert not is_change([1.0] * 3, [2.0] * 3)  # so few may agree by chance
