"""``make gpu``: its parts and its summary, and with ``make test-gpu-standin`` all of it on stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hart_runtime.bench import COMPILED
from hart_runtime.bench.day.cli import SIZES, Given, parts
from hart_runtime.bench.day.part import (
    FAILED,
    MOST_SECONDS,
    NOT_RUN,
    PASSED,
    Outcome,
    Part,
    result_of,
    run_part,
)
from hart_runtime.bench.day.summary import bottleneck, write_summary
from hart_runtime.runtime.backends.names import MODULES, ONNXRUNTIME
from tests.imports import ROOT

DAY = [sys.executable, "-m", "hart_runtime.bench.day.cli"]
SITE = ROOT / "tests" / "gpu_day_site"
COUNTS = "open('count', 'a').write('x'); print('counted')"
STARTS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
LATER = "import time, pathlib; time.sleep(2); pathlib.Path('late').touch()"
MACHINE = {
    "gpu": {"name": "Card", "capability": "8.9", "memory": 24e9},
    "driver": "13.0",
    "python": "3.12",
    "libraries": {"onnxruntime-gpu": "1.31.1", "nvidia-cublas": "13.0"},
}


def python(name: str, script: str, **options: Any) -> Part:
    return Part(name, [sys.executable, "-c", script], **options)


def test_without_a_gpu_it_says_so_and_what_it_would_do(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = tmp_path / "day"
    done = subprocess.run(
        [*DAY, "--output", str(output)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: found no CUDA GPU (")
    for part in parts(Given(), SIZES["whole"], output):
        assert part.name in line
    assert f"writes {output}/summary.md" in line
    assert not output.exists()


def test_every_backend_has_its_parts(tmp_path: Path) -> None:
    for size in SIZES.values():
        day = {part.name: part for part in parts(Given(), size, tmp_path)}
        for name in (ONNXRUNTIME, *MODULES):
            for kind in ("conformance", "compare", "bench"):
                assert name in day[f"{kind}-{name}"].needs
        assert all(part.seconds <= MOST_SECONDS for part in day.values())
        assert any(COMPILED in word for word in day["bench-compiled"].command)
    carried = Given(tmp_path / "bundle", reference=tmp_path / "reference")
    for part in parts(carried, SIZES["whole"], tmp_path, torch=False):
        assert part.name != "bundle"
        if part.name.startswith("compare"):
            assert str(carried.reference) in part.command
            assert "--num-prompts" not in part.command


def test_what_passed_is_not_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        first = run_part(python("counts", COUNTS), tmp_path, {}, tmp_path)
        assert first.verdict == PASSED
        assert first.said == "counted"
    assert (tmp_path / "count").read_text() == "x"


def test_no_part_writes_where_another_keeps_its_result(tmp_path: Path) -> None:
    day = parts(Given(), SIZES["whole"], tmp_path)
    kept = [result_of(part, tmp_path) for part in day]
    made = [word for part in day for word in part.command if word.startswith(str(tmp_path))]
    assert len(set(kept)) == len(day)
    assert not {*map(str, kept)} & {*made}


def test_what_failed_is_told_and_tried_again(tmp_path: Path) -> None:
    part = python("fails", f"{COUNTS}; open('made/x', 'w'); raise SystemExit(3)", makes="made")
    for number in range(2):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "left").touch()
        outcome = run_part(part, tmp_path, {}, tmp_path)
        assert outcome.verdict == FAILED
        assert outcome.said.startswith("exit code ")
        assert (tmp_path / "count").read_text() == "x" * (number + 1)
        assert not (tmp_path / "made").exists()
    assert "Error" in (tmp_path / "fails.log").read_text()


def test_what_is_lacking_is_not_run(tmp_path: Path) -> None:
    part = python("needs", COUNTS, needs=("torch", "tests"))
    outcome = run_part(part, tmp_path, {"tests": "no tests here", "other": "nor this"}, tmp_path)
    assert outcome == Outcome("needs", NOT_RUN, "no tests here")
    assert [*tmp_path.iterdir()] == []


def test_time_is_limited_for_all_that_a_part_started(tmp_path: Path) -> None:
    start = time.perf_counter()
    outcome = run_part(python("hangs", STARTS.format(LATER), seconds=1), tmp_path, {}, tmp_path)
    assert outcome.verdict == FAILED
    assert outcome.said.startswith("took longer than 1 s and was ended; see ")
    assert time.perf_counter() - start < 30
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def stage(name: str, seconds: float, host: float = 0.0, floor: float | None = None, **share: float) -> Any:
    shares = {"operations_share": share.get("operations"), "bytes_share": share.get("bytes")}
    return {"name": name, "seconds": {"p50": seconds}, "host": {"p50": host}, "floor": floor, **shares}


@pytest.mark.parametrize(
    ("worst", "words"),
    [
        (stage("decoder", 0.040, floor=0.030, bytes=0.75, operations=0.2), "bound by memory (75% of"),
        (stage("scales", 0.040, floor=0.030, bytes=0.1, operations=0.75), "bound by arithmetic (75%"),
        (stage("scales", 0.040, floor=0.002, bytes=0.05, operations=0.01), "neither arithmetic nor memory"),
        (stage("scales", 0.010, 0.030, floor=0.002, bytes=0.2, operations=0.1), "the host's work"),
        (stage("host", 0.040), "the host's work"),
        (stage("latent", 0.040), "nothing is counted"),
    ],
)
def test_the_bottleneck(worst: Any, words: str) -> None:
    busy = stage("busy", 0.050, floor=0.049, bytes=0.98, operations=0.5)
    said = bottleneck({"stages": [busy, worst]})
    assert said.startswith(f"{worst['name']}, 40.0 of 90.0 ms")
    assert words in said


def test_the_summary_says_what_passed_at_what_ratio(tmp_path: Path) -> None:
    (tmp_path / "bench-onnxruntime").mkdir()
    result = {
        "latency": [{"seconds": {"p50": 0.1}}],
        "first_pictures": [{"total": 4.0, "gpu_bytes": 5e9}],
        "against": [{"name": "torch-eager", "ratio": {"p50": 2.5}}],
        "breakdown": {"stages": [stage("decoder", 0.04, floor=0.03, bytes=0.75, operations=0.2)]},
    }
    (tmp_path / "bench-onnxruntime" / "bench.json").write_text(json.dumps(result))
    (tmp_path / "rules.json").write_text(json.dumps({"1": ["holds", "late"], "7": ["lenient", "it waits"]}))
    outcomes = [Outcome("rules", PASSED, "all | well", 3.0), Outcome("bench", FAILED, "out of memory")]
    text = write_summary(tmp_path, MACHINE, outcomes).read_text()
    for words in (
        "# Card\n",
        "onnxruntime-gpu 1.31.1",
        "1 of 2 parts passed.",
        "| rules | passed | 3 | all \\| well |",
        "| bench | failed | 0 | out of memory |",
        "| bench-onnxruntime | 100.0 | 4.0 | 5.00 | 2.50 |",
        "- bench-onnxruntime: decoder, 40.0 of 40.0 ms where 30.0 would do, bound by memory",
        "- rule 7, lenient: it waits",
    ):
        assert words in text
    assert "nvidia-cublas" not in text
    assert "rule 1" not in text


@pytest.mark.gpu_standin
def test_the_whole_day_on_stand_ins(demo_bundle: Path, tmp_path: Path) -> None:
    """In its smallest form, with a bundle that was carried there, where TensorRT-RTX does not build."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (SITE, ROOT / "src", ROOT))),
        "HART_STANDINS": "onnxruntime,tensorrt",
        "HART_STANDIN_CAPABILITY": "9.0",
    }
    command = [*DAY, "--size", "smallest", "--engine", str(bundle), "--output", str(tmp_path / "day")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    for part in parts(Given(bundle), SIZES["smallest"], tmp_path):
        if part.name == "bench-compiled":
            assert "torch does not compute on this GPU" in lines[part.name]
        elif "tensorrt-rtx" in part.name:
            assert "does not build for compute capability 9.0" in lines[part.name]
        else:
            assert lines[part.name].startswith("passed, "), lines[part.name]
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.stdout == done.stdout  # from what was kept
    assert "## Speed" in (tmp_path / "day" / "summary.md").read_text()
