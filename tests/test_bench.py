"""The benchmark measures what it says; how fast anything is never decides a test."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hart_runtime import Pipeline
from hart_runtime.bench.cli import main
from hart_runtime.bench.host import main as host_main
from hart_runtime.bench.machine import Company
from hart_runtime.bench.timing import TimedBackend, by_graph, by_stage
from hart_runtime.bench.workload import drawing
from hart_runtime.runtime.backends.backend import (
    Backend,
    Lease,
    Limits,
    Outputs,
    Unplanned,
    Values,
    first_half,
)
from hart_runtime.runtime.program import Program, Run
from hart_runtime.runtime.text import ENCODE
from tests.conftest import ExportOnce
from tests.golden_runs import HERE


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


class Clocked:
    """A backend whose graphs take a thousand seconds each, on a clock of the test's."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.now = backend, 0.0
        self.name, self.device, self.limits = backend.name, backend.device, backend.limits

        self.append, self.mark, self.wait = backend.append, backend.mark, backend.wait

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return Unplanned(self).begin(program)

    def split(self, value: Any) -> list[Any]:
        self.now += 1
        return self.backend.split(value)

    def half(self, value: Any) -> Any:
        return self.backend.half(value)

    def run(self, run: Run, inputs: Values) -> Outputs:
        self.now += 1000
        return self.backend.run(run, inputs)

    def to_host(self, value: Any) -> Any:
        self.now += 1
        return self.backend.to_host(value)


def test_stages_and_host_time_add_up_to_the_wall_time(
    demo: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = Clocked(demo.backend)
    monkeypatch.setattr("hart_runtime.bench.timing.time", SimpleNamespace(perf_counter=lambda: clocked.now))
    timed = TimedBackend(clocked)
    trace = timed.trace(drawing(Pipeline(demo.bundle, timed), 1))
    assert sum(span.seconds for span in trace.spans) == trace.wall == clocked.now
    stages = by_stage(trace.spans)
    assert sum(stage.inside + stage.host for stage in stages.values()) == trace.wall
    assert sum(by_graph(trace.spans).values()) == trace.wall
    assert stages["text encoder"].inside == stages["scale 4 transformer"].inside == 1000
    assert stages["scale 0 sampling"].inside == 2000  # the draw and the way to the next scale
    assert stages["decoder"].inside == 2000  # the last codes, then the pixels
    assert sum(stage.host for stage in stages.values()) == trace.wall % 1000 > 0


def test_the_host_alone_is_measured_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = CliRunner().invoke(host_main, ["--shape", "mid-256px", "--batch", "2", "--iterations", "3"])
    assert done.exit_code == 0, done.output
    for line in (
        r"mid-256px: 2 picture\(s\) of 256 x 256 px, medians of 3",
        r"the host's own work: [\d.]+ ms \(from [\d.]+ to [\d.]+\)",
        r"a device at its floor is busy for: [\d.]+ ms",
        r"  from the first scale to the picture it waits for the host: [\d.]+ ms",
        r"  the next picture waits for the file of this one: [\d.]+ ms",
        r"copied to the device: 0\.9 MB a picture",
        r"copied back at the end, with a wait: 3 times a batch",
    ):
        assert re.search(line, done.output), (line, done.output)


@dataclass
class Later:
    """An output that may not be there yet."""

    job: Future[dict[str, Any]]
    name: str


class Stream:
    """ONNX Runtime behind a queue: a run returns at once, and only to_host waits."""

    name = device = "stream"
    limits: Limits | None = None

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.queue = pipeline, ThreadPoolExecutor(1)

    def run(self, run: Run, inputs: Values) -> Outputs:
        def work() -> dict[str, Any]:
            return self.pipeline.backend.run(run, {name: ready(value) for name, value in inputs.items()})

        job = self.queue.submit(work)
        return {s.name: Later(job, s.name) for s in self.pipeline.bundle.manifest.graphs[run.graph].outputs}

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return Unplanned(self).begin(program)

    def append(self, past: Any, new: Any) -> Any:
        return self.pipeline.backend.append(ready(past), ready(new))

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass

    def split(self, value: Any) -> list[Any]:
        return list(self.to_host(value)[:, None])

    def half(self, value: Any) -> Any:
        return first_half(self.to_host(value))

    def to_host(self, value: Any) -> Any:
        return self.pipeline.backend.to_host(ready(value))


def ready(value: Any) -> Any:
    return value.job.result()[value.name] if isinstance(value, Later) else value


class StreamWithEvents(Stream):
    """The same, and it can time its own queue."""

    def event(self) -> Future[float]:
        return self.queue.submit(time.perf_counter)

    def seconds_between(self, first: Future[float], second: Future[float]) -> float:
        return second.result() - first.result()


def test_asynchronous_work_is_waited_for(demo: Pipeline) -> None:
    timed = TimedBackend(Stream(demo))
    ids, mask = np.zeros((1, 16), np.int64), np.ones((1, 16), np.bool_)
    features = timed.run(ENCODE, {"input_ids": ids, "mask": mask})["features"]
    assert features.job.done()


def test_events_are_not_waited_for(demo: Pipeline) -> None:
    stream = StreamWithEvents(demo)
    timed = TimedBackend(stream)
    gate = threading.Event()
    stream.queue.submit(gate.wait)
    ids, mask = np.zeros((1, 16), np.int64), np.ones((1, 16), np.bool_)
    jobs = []

    def work() -> None:
        jobs.append(timed.run(ENCODE, {"input_ids": ids, "mask": mask})["features"].job)
        assert not jobs[0].done()
        gate.set()

    trace = timed.trace(work)
    assert jobs[0].done()
    assert [span.run for span in trace.spans] == [None, ENCODE, None]


@pytest.mark.parametrize("kind", [Stream, StreamWithEvents])
def test_an_asynchronous_backend_draws_the_same_picture(demo: Pipeline, kind: type[Stream]) -> None:
    timed = TimedBackend(kind(demo))
    pictures: list[bytes] = []
    draw = drawing(Pipeline(demo.bundle, timed), 1)
    trace = timed.trace(lambda: pictures.append(draw()[0].tobytes()))
    assert pictures == [drawing(demo, 1)()[0].tobytes()]
    assert all(span.seconds >= 0 for span in trace.spans)
    assert by_stage(trace.spans)["residual step 7"].inside > 0


@pytest.fixture(scope="module")
def results(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One benchmark of the demo."""
    output = tmp_path_factory.mktemp("bench") / "demo"
    options = ["--threads", 1, "--batch", "2,1", "--iterations", 4, "--warmup", 1]
    done = bench(
        "--engine", demo_bundle, "--device", "cpu", *options, "--against", "torch-eager", "--output", output
    )
    assert done.exit_code == 0, done.output + done.stderr
    assert str(output) in done.output
    for words in ("pictures/s", "scale 4 transformer", "torch-eager", "peak resident", "x floor"):
        assert words in done.output
    return output


def test_what_a_result_holds(results: Path) -> None:
    names = ["batches.png", "bench.json", "bench.md", "scales.png"]
    assert sorted(file.name for file in results.iterdir()) == names
    assert [file.name for file in results.parent.iterdir()] == ["demo"]
    found = json.loads((results / "bench.json").read_text())
    assert found["schema"] == 1
    assert found["peak"]["operations"] > 0 < found["peak"]["bytes"]
    assert [row["batch"] for row in found["latency"]] == [2, 1]
    for row in found["latency"]:
        seconds = row["seconds"]
        assert len(seconds["values"]) == 4
        assert min(seconds["values"]) <= seconds["p50"] <= seconds["p99"] <= max(seconds["values"])
        assert row["pictures_per_second"] == pytest.approx(row["batch"] / seconds["p50"])
    for first in found["first_pictures"]:
        assert 0 < first["imports_bytes"] < first["peak_bytes"]
        parts = [first[name] for name in ("imports", "verify", "open", "run", "save")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(first["total"])


def test_the_stages_of_a_result(results: Path) -> None:
    breakdown = json.loads((results / "bench.json").read_text())["breakdown"]
    stages = breakdown["stages"]
    names = ["text encoder", "context"]
    names += [f"scale {k} {part}" for k in range(5) for part in ("transformer", "sampling")]
    names += ["residual condition", *(f"residual step {i}" for i in range(8)), "decoder", "host"]
    assert [stage["name"] for stage in stages] == names
    for i, wall in enumerate(breakdown["wall"]["values"]):
        parts = sum(s["seconds"]["values"][i] + s["host"]["values"][i] for s in stages)
        assert parts <= wall
        assert parts == pytest.approx(sum(g["values"][i] for g in breakdown["graphs"].values()))
    for stage in stages[:-1]:
        assert stage["operations"] > 0 < stage["bytes"]
        share = max(stage["operations_share"], stage["bytes_share"])
        assert share == pytest.approx(stage["floor"] / stage["seconds"]["p50"])
    assert stages[-1]["operations"] is None


def test_the_reference_drew_the_same_picture(results: Path) -> None:
    """The bundle is half precision, the reference on the CPU is not."""
    (row,) = json.loads((results / "bench.json").read_text())["against"]
    assert row["psnr"] is None or row["psnr"] > 30
    ratios = [a / b for a, b in zip(row["seconds"]["values"], row["ours"]["values"], strict=True)]
    assert row["ratio"]["values"] == pytest.approx(ratios)


def test_a_result_tells_of_more_machines(results: Path, tmp_path: Path) -> None:
    output = tmp_path / "prediction.json"
    words = ("scale", results, "--workers", "1,10,1..4", "--share", 0.5, "--price", 2, "--seconds", 60)
    done = bench(*words, "--output", output)
    assert done.exit_code == 0, done.output
    assert "10 workers, " in done.output
    one, ten, grown = json.loads(output.read_text())["rows"]
    assert (grown["workers"], grown["most_workers"]) == (1, 4)
    assert "1 to 4 workers, " in done.output
    assert (one["workers"], ten["workers"], one["batch"]) == (1, 10, 2)
    assert ten["rate"] == pytest.approx(10 * one["rate"])
    assert ten["pictures_per_second"] == pytest.approx(ten["rate"], rel=0.2)
    assert one["price_of_1000"] > 0
    values = json.loads((results / "bench.json").read_text())
    values["latency"] = [row for row in values["latency"] if row["batch"] == 1]
    (alone := tmp_path / "alone.json").write_text(json.dumps(values))
    refused = bench("scale", alone)
    assert (refused.exit_code, "found 1 alone; measure --batch 1,4,8" in refused.output) == (2, True)
    assert bench("scale", results, "--workers", "0").exit_code == 2


def test_a_result_compared_with_itself_and_with_a_slower_one(results: Path, tmp_path: Path) -> None:
    same = bench("compare", results, results / "bench.json")
    assert same.exit_code == 0, same.output
    assert same.output.splitlines()[-1].startswith("0 of ")
    values = json.loads((results / "bench.json").read_text())
    values["machine"]["cpu"] = "another"
    for stage in values["breakdown"]["stages"]:
        if stage["name"] == "decoder":
            stage["seconds"]["values"] = [100 * v for v in stage["seconds"]["values"]]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(values))
    done = bench("compare", results, slower)
    assert done.exit_code == 0, done.output
    assert "decoder" in done.output
    assert "+9900.0%" in done.output
    assert "note: CPU: " in done.output
    assert done.output.splitlines()[-1].startswith("1 of ")


def test_compare_refuses_what_is_no_result(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    refused(bench("compare", results, other), "other.json", "no such file")
    other.write_text("{}")
    refused(bench("compare", results, other), "other.json", "not a result")
    other.write_text('{"schema": 99, "breakdown": {}}')
    refused(bench("compare", results, other), "schema 99", "upgrade")


def put(*path: str | int, value: Any) -> Callable[[Any], object]:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


LATENCY, STAGE = ("latency", 0), ("breakdown", "stages", 3)
DAMAGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "no breakdown": (lambda v: v.pop("breakdown"), "not a result of hart-bench"),
    "schema that is true": (put("schema", value=True), "not a result of hart-bench"),
    "schema without end": (put("schema", value="1"), "not a result of hart-bench"),
    "of nobody": (put("schema", value=0), "not a result of hart-bench"),
    "a breakdown that is text": (put("breakdown", value="fast"), "breakdown: expected an object"),
    "stages in an object": (put("breakdown", "stages", value={}), "breakdown.stages: expected a list"),
    "a stage without a name": (
        lambda v: v["breakdown"]["stages"][3].pop("name"),
        "stages[3]: name is missing",
    ),
    "a name that is a number": (put(*STAGE, "name", value=3), "stages[3].name: expected text"),
    "a name that is half a character": (put(*STAGE, "name", value="\ud800"), "expected text, found half"),
    "samples that are text": (
        put(*STAGE, "host", "values", value=["0.1"]),
        "host.values[0]: expected a number",
    ),
    "a sample in a list": (
        put(*LATENCY, "seconds", "values", 0, value=[1.0]),
        "expected a number, found [1.0]",
    ),
    "a sample that is true": (
        put(*LATENCY, "seconds", "values", 0, value=True),
        "expected a number, found True",
    ),
    "a sample beyond a float": (put(*LATENCY, "seconds", "values", 0, value=10**400), "expected a number"),
    "NaN": (put(*LATENCY, "seconds", "p50", value=float("nan")), "NaN is no number of JSON"),
    "infinity": (put("peak", "bytes", value=float("inf")), "Infinity is no number of JSON"),
    "no first picture": (put("first_pictures", value=[]), "first_pictures: expected at least one"),
    "half a first picture": (lambda v: v["first_pictures"][0].pop("total"), "total is missing"),
    "no company": (put("company", value=None), "company: expected an object"),
    "a field of nobody": (put("colour", value=1), "unknown colour"),
}
BROKEN = [b"", b"[]", b'{"schema": 1', b"\xff\xfe{}", b"<!doctype html>", b"[" * 100_000]


@pytest.mark.parametrize("name", DAMAGED)
def test_compare_refuses_what_is_damaged(results: Path, tmp_path: Path, name: str) -> None:
    """Whichever of the two it is, in one line that says where."""
    change, words = DAMAGED[name]
    values = json.loads((results / "bench.json").read_text())
    change(values)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    for pair in ((results, other), (other, results)):
        done = bench("compare", *pair)
        refused(done, f"{other}: ", words)
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


@pytest.mark.parametrize("raw", [*BROKEN, None])
def test_compare_refuses_what_cannot_be_read(results: Path, tmp_path: Path, raw: bytes | None) -> None:
    """None: half of a result."""
    whole = (results / "bench.json").read_bytes()
    (tmp_path / "other.json").write_bytes(whole[: len(whole) // 2] if raw is None else raw)
    done = bench("compare", tmp_path / "other.json", results)
    refused(done, "other.json: ")
    assert done.stderr.count("\n") == 1


def test_a_bundle_without_text_encoder_starts_at_features(export_once: ExportOnce, tmp_path: Path) -> None:
    variant = HERE / "t2i_main"
    bundle, output = export_once(variant, "fp32"), tmp_path / "result"
    options = ["--engine", bundle, "--device", "cpu", "--iterations", 1, "--warmup", 1]
    refused(bench(*options, "--against", "torch-eager"), "t2i_main", "give its folder as --checkpoint")
    against = ["--against", "torch-eager", "--checkpoint"]
    refused(bench(*options, *against, HERE / "t2i_adaln"), "t2i_adaln", "was exported from")
    done = bench(*options, *against, variant, "--output", output)
    assert done.exit_code == 0, done.output + done.stderr
    assert "random text features" in done.output
    found = json.loads((output / "bench.json").read_text())
    assert found["breakdown"]["stages"][0]["name"] == "context"
    (row,) = found["against"]
    assert row["psnr"] is None or row["psnr"] > 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "9"], ("--batch", "expected 1 to 8", "found 9")),
        (["--batch", "one"], ("--batch", "1,4,8", "'one'")),
        (["--against", "jax"], ("--against", "torch-eager", "jax")),
        (["--backend", "auto", "--output", "."], ("--output", "exists already")),
    ],
)
def test_refused_before_anything_is_measured(
    demo_bundle: Path, options: list[str], words: tuple[str, ...]
) -> None:
    refused(bench("--engine", demo_bundle, *options), *words)


def test_an_engine_is_needed(tmp_path: Path) -> None:
    refused(bench(), "--engine")
    refused(bench("--engine", tmp_path), "no bundle here")


def test_the_fresh_process_never_imports_torch(demo_bundle: Path) -> None:
    """Its memory would be that of torch."""
    script = f"""
import sys, time
for name in ("torch", "onnx", "transformers", "safetensors", "matplotlib"):
    sys.modules[name] = None
from hart_runtime.bench.fresh import _draw
how = dict(device="cpu", threads=1, backend="auto", size=None, started=time.time())
print(_draw(dict(how, bundle={str(demo_bundle)!r}))["peak_bytes"] > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_company_is_mentioned_when_it_matters() -> None:
    assert Company(0.01, 2, 1).warning() is None
    assert Company(0.8, 2, 1).warning() == "other processes used 0.8 of 2 cores meanwhile"
    assert Company(0.8, 2, 2).warning() == "other processes used 0.8 of 2 cores and the GPU meanwhile"
