"""A small Jetson: engines alone, TensorRT 10.3, 8 GB that CPU and GPU share; no torch, no ONNX Runtime."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError
from hart_runtime.compare.cli import main as compare
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.memory.forecast import PROCESS, needed
from hart_runtime.runtime.tensorrt import package
from hart_runtime.runtime.tensorrt.cli import main as build
from tests.imports import ROOT
from tests.strict.device import ORIN, Card
from tests.test_strict_engines import on_a_machine, with_engines

VERSION = "10.3.0"
PROMPT = "a red circle on a white background"
REFUSES = """
import importlib.abc, sys

ABSENT = {"torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir"}
for name in [*sys.modules]:  # the stand-ins hold what they loaded
    if name.partition(".")[0] in ABSENT:
        del sys.modules[name]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def carried(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle that was exported elsewhere and has engines for the board."""
    folder = tmp_path_factory.mktemp("jetson")
    with pytest.MonkeyPatch.context() as patch:
        with_engines(open_bundle(demo_bundle), folder / "bundle", on_a_machine(patch, VERSION, ORIN))
    return folder


def on_the_board(folder: Path, module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that has nothing of what exports need."""
    script = f"{REFUSES}\nfrom hart_runtime.{module}.cli import main\nmain()"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests" / "gpu_day_site", ROOT / "src", ROOT))),
        "HART_STANDINS": f"tensorrt={VERSION}",
        "HART_STANDIN_CAPABILITY": "8.7",
    }
    command = [sys.executable, "-c", script, "--engine", "bundle", *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_engines_alone_draw(carried: Path, demo: Pipeline) -> None:
    done = on_the_board(carried, "runtime", PROMPT, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    drawn = json.loads(done.stdout)
    assert (drawn["backend"], drawn["device"]) == ("tensorrt", "cuda")
    with Image.open(carried / drawn["images"][0]["path"]) as picture:
        found = np.asarray(picture, float)
    assert np.abs(found - np.asarray(demo(PROMPT)[0], float)).mean() < 2


@pytest.mark.gpu_standin
def test_they_are_compared_with_a_saved_reference(carried: Path, demo_bundle: Path) -> None:
    words = [
        "--engine",
        demo_bundle,
        "--device",
        "cpu",
        "--num-prompts",
        1,
        "--output",
        carried / "elsewhere",
    ]
    saved = CliRunner().invoke(compare, [*map(str, words), "--save-reference", str(carried / "reference")])
    assert saved.exit_code == 0, saved.output
    done = on_the_board(carried, "compare", "--reference", "reference", "--output", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((carried / "report" / "report.json").read_text())
    assert report["passed"]
    assert report["runs"][0]["candidate"]["version"] == f"tensorrt {VERSION}"


def test_nothing_but_engines_is_there(carried: Path) -> None:
    done = on_the_board(carried, "runtime", PROMPT, "--backend", "onnxruntime")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "no inference library is installed" in line


def test_pip_is_not_where_a_jetson_has_tensorrt_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"install it with: .*\[tensorrt\]"):
        package.import_package("tensorrt")
    board = tmp_path / "nv_tegra_release"
    board.touch()
    monkeypatch.setattr(package, "JETSON", board)
    with pytest.raises(InputError, match=r"it comes with JetPack .* sees the system's packages"):
        package.import_package("tensorrt")


@pytest.mark.parametrize(
    ("card", "words"), [(ORIN, "of the memory that CPU and GPU share: "), (Card(), "on the device: ")]
)
def test_shared_memory_is_counted_once(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, card: Card, words: str
) -> None:
    on_a_machine(monkeypatch, VERSION, card)
    done = CliRunner().invoke(build, ["--engine", str(demo_bundle), "--backend", "tensorrt", "--dry-run"])
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("batch 1 needs about "))
    assert words in line
    assert ("the host's buffers" in line) == card.integrated
    memory = needed(open_bundle(demo_bundle).manifest, 1)
    stored = open_bundle(demo_bundle).manifest.files[WEIGHTS].size
    assert memory.weights + memory.text == stored
    assert memory.shared == memory.total + memory.staged + PROCESS


def test_what_the_host_holds_is_what_is_told(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory of a drawn picture: what the plan copies, and where the picture lands."""
    trt = on_a_machine(monkeypatch, VERSION, ORIN)
    pipeline = Pipeline.load(carried / "bundle", backend="tensorrt")
    pipeline(PROMPT)
    locked = sum(held.nbytes for held in trt.cuda.pinned.values())
    manifest = pipeline.bundle.manifest
    memory = needed(manifest, 1)
    landing = 3 * 4 * manifest.model.image_size**2
    given = 9 * manifest.model.context_token + 4 * manifest.model.context_token * manifest.model.context_dim
    assert 0.9 * memory.staged <= locked <= memory.staged + landing + given
    assert trt.cuda.counts.peak <= memory.total
    del pipeline
    gc.collect()
    trt.cuda.finish()
