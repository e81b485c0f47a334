"""ONNX Runtime's CUDA provider itself, on libraries without a device: placement, capture, copies, memory.

Its environment has ``onnxruntime-gpu`` and no torch, so pictures are drawn by a process there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.dry_run import forecast
from hart_runtime.export.request import Request
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.random_checkpoint import read_shape, write_random_checkpoint
from tests.conftest import ExportOnce
from tests.golden_runs import HERE as GOLDEN
from tests.gpu_standin.libraries import build
from tests.gpu_standin.log import WAITS, Call, alive, copies, peak, read_log
from tests.imports import ROOT

pytestmark = pytest.mark.gpu_standin

ENVIRONMENT = ROOT / ".venv-gpu"
PICTURES = 3
"""Every call runs plainly, is captured, and is replayed."""
SHAPE_OPERATORS = {
    *("Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"),
    *("Add", "Sub", "Mul", "Div", "Floor", "Equal", "Where", "Expand", "Constant", "ConstantOfShape"),
}
MOST_COPIED = 20e6
"""Bytes that a picture may copy to the device."""
GB = 1e9
OTHERS = [Path(p) for p in os.environ.get("HART_STANDIN_BUNDLES", "").split(os.pathsep) if p]
"""More bundles to draw, such as one of the published depth."""


@dataclass(frozen=True)
class Case:
    """A bundle on a device."""

    name: str
    limit: float
    """Most device memory, in bytes."""
    capability: str = "8.9"

    def __str__(self) -> str:
        return f"{self.name}-{self.capability}"


TWO_BLOCKS = Case("two-blocks", 4.2 * GB)
"""Of the published widths and pyramid; most is the decoder's scratch at 1024 px."""
SMALL_CARD = 7 * GB
"""What there is beside a display on a card of 8 GB."""
CASES = [
    Case("demo", 0.02 * GB),
    Case("demo", 0.02 * GB, "9.0"),
    Case("adaln", 0.02 * GB),
    TWO_BLOCKS,
    *(Case(str(bundle), SMALL_CARD) for bundle in OTHERS),
]


@dataclass(frozen=True)
class Drawn:
    """What a process that drew :data:`PICTURES` pictures wrote down."""

    case: Case
    found: dict[str, Any]
    calls: list[Call]

    def picture(self, number: int) -> list[Call]:
        return [call for call in self.calls if call.picture == number]

    @property
    def planned(self) -> list[dict[str, Any]]:
        return [call for call in self.found["calls"] if call["planned"]]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [*ENVIRONMENT.glob("lib/python*/site-packages/onnxruntime")]
    assert found, f"{ENVIRONMENT}: expected an environment with onnxruntime-gpu; run `make test-gpu-standin`"
    return build(found[0], tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published widths and pyramid, two blocks deep."""
    folder = tmp_path_factory.mktemp("two-blocks")
    shape = read_shape("hart-0.7b-1024px")
    write_random_checkpoint(
        replace(shape, llm=replace(shape.llm, depth=2)), folder / "checkpoint", dtype="fp16"
    )
    request = Request(find_checkpoint(folder / "checkpoint"), "fp16", system_prompt="none")
    export_bundle(request, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="session", params=CASES, ids=str)
def drawn(
    request: pytest.FixtureRequest,
    export_once: ExportOnce,
    libraries: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Drawn:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("drawn")
    done = draw(bundle_of(case, request, export_once), folder, libraries, case.capability)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return Drawn(case, found, read_log(folder / "log"))


def bundle_of(case: Case, request: pytest.FixtureRequest, export_once: ExportOnce) -> Path:
    checkpoints = {"demo": DEMO_CHECKPOINT, "adaln": GOLDEN / "t2i_adaln"}
    if case.name in checkpoints:
        return export_once(checkpoints[case.name], "fp16")
    if case.name == "two-blocks":
        return Path(request.getfixturevalue("two_blocks"))
    return Path(case.name)


def draw(
    bundle: Path, folder: Path, libraries: Path, capability: str = "8.9", *words: str, memory: float = 24 * GB
) -> subprocess.CompletedProcess[str]:
    """Draw with the GPU's ONNX Runtime; ``words`` as :mod:`tests.gpu_standin.draw` takes them."""
    given = ["-m", "tests.gpu_standin.draw", str(bundle), str(folder / "found.json"), str(PICTURES), *words]
    return in_the_environment(given, folder, libraries, capability, memory)


def in_the_environment(
    command: list[str], folder: Path, libraries: Path, capability: str = "8.9", memory: float = 24 * GB
) -> subprocess.CompletedProcess[str]:
    """Run its Python on the stand-in's libraries, whose log goes to ``folder``."""
    site = ROOT / "tests" / "gpu_standin" / "site"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, site))),
        "CUDA_STANDIN_LOG": str(folder / "log"),
        "CUDA_STANDIN_CAPABILITY": capability,
        "CUDA_STANDIN_MEMORY": str(int(memory)),
    }
    python = str(ENVIRONMENT / "bin" / "python")
    return subprocess.run(
        [python, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_graph_can_be_captured(drawn: Drawn) -> None:
    """ONNX Runtime refuses a graph that copies between CPU and GPU, or computes on the CPU."""
    assert {s["graph"]: s["error"] for s in drawn.found["sessions"] if s["error"]} == {}
    opened = {s["graph"]: s["options"]["enable_cuda_graph"] for s in drawn.found["sessions"]}
    assert opened == dict.fromkeys(drawn.found["deciding"], "1")
    assert drawn.found["warnings"] == []


def test_only_arithmetic_on_shapes_is_on_the_cpu(drawn: Drawn) -> None:
    computing = {s["graph"]: set(s.get("on_the_cpu", ())) - SHAPE_OPERATORS for s in drawn.found["sessions"]}
    assert {graph: operators for graph, operators in computing.items() if operators} == {}


def test_what_decides_shapes_is_read_on_the_host(drawn: Drawn) -> None:
    read = {s["graph"]: s.get("on_the_host", []) for s in drawn.found["sessions"]}
    assert read == drawn.found["deciding"]
    assert any(read.values())


def test_float32_is_computed_in_float32(drawn: Drawn) -> None:
    assert {s["options"]["use_tf32"] for s in drawn.found["sessions"] if not s["error"]} == {"0"}


def test_every_planned_call_is_captured_once(drawn: Drawn) -> None:
    assert [call.rest for call in drawn.calls if call.name == "ILLEGAL"] == []
    ended = Counter(call.amount for call in drawn.calls if call.name == "cudaStreamEndCapture")
    assert ended == {0: len(drawn.planned)}
    assert {c.picture for c in drawn.calls if c.name == "cudaStreamBeginCapture"} == {1}


def test_a_planned_call_is_one_launch(drawn: Drawn) -> None:
    launches: Counter[int | None] = Counter()
    kernels: Counter[int | None] = Counter()
    for call in drawn.picture(PICTURES - 1):
        launches[call.run] += call.name == "cudaGraphLaunch"
        kernels[call.run] += call.name == "kernel"
    planned = [number for number, call in enumerate(drawn.found["calls"]) if call["planned"]]
    assert len(planned) > len(drawn.found["calls"]) / 2
    assert {run: n for run, n in launches.items() if n} == dict.fromkeys(planned, 1)
    assert {run: kernels[run] for run in planned if kernels[run]} == {}


def test_nothing_waits_between_the_first_scale_and_the_picture(drawn: Drawn) -> None:
    calls = drawn.picture(PICTURES - 1)
    runs = [number for number, call in enumerate(calls) if call.run is not None]
    first = max(number for number, call in enumerate(calls) if call.run == 0)
    between = calls[first + 1 : runs[-1] + 1]
    assert sum(call.name == "cudaGraphLaunch" for call in between) > 10
    assert [call for call in between if call.name in WAITS or "Malloc" in call.name] == []
    assert copies(between, "D2H") == []


def test_only_what_is_new_is_copied_to_the_device(drawn: Drawn) -> None:
    """What a picture brings is what its plan uploads, and the text."""
    copied = copies(drawn.picture(PICTURES - 1), "H2D")
    assert [call for call in copied if "pageable" in call.rest] == []
    nbytes = sum(call.amount for call in copied)
    uploaded = sum(sum(call["uploads"].values()) for call in drawn.found["calls"])
    assert uploaded <= nbytes <= uploaded + drawn.found["given"]
    assert nbytes <= MOST_COPIED


def test_memory_on_the_device(drawn: Drawn) -> None:
    assert peak(drawn.calls) > drawn.found["arena"] + drawn.found["constants"]
    assert peak(drawn.calls) <= drawn.case.limit
    assert peak(drawn.calls, "cudaMallocHost", "cudaFreeHost") <= 0.2 * GB


@pytest.mark.parametrize("drawn", CASES[3:], indirect=True, ids=str)
def test_a_dry_run_knew_the_memory(drawn: Drawn) -> None:
    """Of large models; the small ones' is rounding."""
    known = sum(drawn.found["forecast"][part] for part in ("weights", "arena", "constants", "scratch"))
    assert peak(drawn.calls) == pytest.approx(known, rel=0.15)


@pytest.mark.parametrize("drawn", [TWO_BLOCKS], indirect=True, ids=str)
def test_the_published_depth_fits_a_small_card_in_memory(drawn: Drawn, full: Path) -> None:
    """More blocks are more weights and more cache, as a dry run says; scratch is that of one block."""
    two = drawn.found["forecast"]
    scratch = peak(drawn.calls) - two["weights"] - two["arena"] - two["constants"]
    deep = forecast(Request(find_checkpoint(full), "fp16")).device["fp16", 1]
    assert deep.weights + deep.arena > two["weights"] + two["arena"] + 2 * GB
    assert deep.weights + deep.arena + deep.constants + scratch <= SMALL_CARD


def test_later_pictures_take_no_more(drawn: Drawn) -> None:
    last = [call for call in drawn.picture(PICTURES - 1) if "Malloc" in call.name and call.run is not None]
    assert last == []


def test_everything_is_given_back(drawn: Drawn) -> None:
    """No stream, event or graph outlives the backends."""
    pairs = {
        "cudaStreamCreate": "cudaStreamDestroy",
        "cudaEventCreate": "cudaEventDestroy",
        "cudaGraphInstantiate": "cudaGraphExecDestroy",
    }
    assert {made: alive(drawn.calls, made, gone) for made, gone in pairs.items()} == dict.fromkeys(pairs, 0)


def test_strict_accepts_the_demo(demo_bundle: Path, libraries: Path, tmp_path: Path) -> None:
    done = draw(demo_bundle, tmp_path, libraries, "8.9", "strict")
    assert done.returncode == 0, done.stderr


def test_a_missing_cudnn_is_one_sentence(demo_bundle: Path, libraries: Path, tmp_path: Path) -> None:
    """Before the first picture, in which ONNX Runtime would look for it."""
    others = tmp_path / "libraries"
    shutil.copytree(libraries, others, ignore=shutil.ignore_patterns("libcudnn.*"))
    done = draw(demo_bundle, tmp_path, others)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ONNX Runtime needs cuDNN, which cannot be loaded (libcudnn.so.9: " in last
    assert "picture" not in last


def test_a_full_device_is_one_sentence(demo_bundle: Path, libraries: Path, tmp_path: Path) -> None:
    done = draw(demo_bundle, tmp_path, libraries, memory=4e6)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hart_runtime.common.errors.")
    assert "memory" in last


STRICT = """
from cuda.bindings.runtime import *
_, stream = cudaStreamCreateWithFlags(cudaStreamNonBlocking)
_, memory = cudaMalloc(1024)
kind = cudaMemcpyKind.cudaMemcpyHostToDevice
host = cudaMallocHost(2048)[1]
print(*(int(status) for status in (
    cudaMemcpyAsync(memory, host, 1024, kind, stream)[0],
    cudaMemcpyAsync(memory, host, 1025, kind, stream)[0],
    cudaMemcpyAsync(host, memory, 1024, kind, stream)[0],
    cudaMalloc(1 << 20)[0],
    cudaStreamBeginCapture(stream, 0)[0],
    cudaStreamSynchronize(stream)[0],
    cudaMemcpyAsync(memory, host, 1024, kind, stream)[0],
    cudaStreamEndCapture(stream)[0],
    cudaStreamSynchronize(stream)[0],
)))
import ctypes
ctypes.string_at(memory, 1)
"""


def test_the_standin_refuses_what_cuda_refuses(libraries: Path, tmp_path: Path) -> None:
    done = in_the_environment(["-c", STRICT], tmp_path, libraries, memory=1 << 20)
    assert done.stdout.split() == ["0", "1", "21", "2", "0", "900", "901", "901", "0"]
    assert done.returncode == -signal.SIGSEGV  # the host read device memory
