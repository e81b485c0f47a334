"""What comparing two results of the benchmark says, and what it cannot say."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hart_runtime.bench.cli import main
from hart_runtime.bench.compare import CONDITIONS, compare, different_conditions, is_change

Values = dict[str, Any]
RESULT: Values = {
    "schema": 1,
    "bundle": {"identity": "a", "precision": "fp32", "image_size": 64, "sampling": {}, "starts_at": "prompt"},
    "device": "cpu",
    "backend": "onnxruntime",
    "threads": 2,
    "machine": {"cpu": "x", "cores": 2, "libraries": {"numpy": "2"}, "python": "3.11", "system": "Linux"},
    "company": {"cores": 2, "cores_used": 0.0},
    "first_pictures": [{"imports": 1.0}],
    "latency": [
        {"batch": 1, "seconds": {"values": [1.0] * 4}},
        {"batch": 4, "seconds": {"values": [3.0] * 4}},
    ],
    "against": [{"name": "torch-eager", "ratio": {"values": [2.0] * 4}}],
    "breakdown": {
        "batch": 1,
        "stages": [{"name": "decoder", "seconds": {"values": [1.0] * 4}, "host": {"values": [0.1] * 4}}],
        "graphs": {"transformer": {"values": [1.0] * 4}},
    },
}


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
    held(other, tuple(path))[last] = "another"
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
        values["latency"][0]["seconds"]["values"] = [seconds] * count
    (change,) = [change for change in compare(*results) if change.name == "batch 1"]
    assert change.few
    said = told(*results, folder=tmp_path)
    assert "0 of 5 quantities changed; 2 could not be judged, of fewer than 4 samples: measure with" in said
    assert "batch 1" not in said


def test_noise_is_not_a_change() -> None:
    assert is_change([1.0, 1.1, 1.05, 1.0], [0.8, 0.9, 0.85, 0.8])
    assert not is_change([1.0, 1.1, 1.05, 1.0], [1.02, 1.08, 1.04, 1.0])
    assert not is_change([1.0] * 4, [1.005] * 4)  # certain, but tiny
    assert not is_change([1.0] * 3, [2.0] * 3)  # so few may agree by chance
