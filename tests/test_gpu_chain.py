"""The commands one after another as somebody types them, on a strict TensorRT 11.4 and CUDA."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hart_runtime import Pipeline
from hart_runtime.bench import peak
from hart_runtime.bench.cli import main as bench
from hart_runtime.compare.cli import main as compare
from hart_runtime.export.cli import main as export
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.families.names import DECODER, TRANSFORMER
from tests.imports import ROOT
from tests.strict import install_cuda, install_tensorrt

VERSION = "11.4.0.106"
PROMPT = "a red circle on a white background"
ENGINES = ["--engine", "engines/"]
SITE = [ROOT / "tests" / "gpu_day_site", ROOT / "src", ROOT]

Typed = Callable[[click.Command, list[str]], str]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Runs a command in an empty folder, on a machine with a GPU, and returns what it says."""
    install_tensorrt(monkeypatch, install_cuda(monkeypatch), VERSION)
    monkeypatch.chdir(tmp_path)

    def call(command: click.Command, words: list[str]) -> str:
        done = CliRunner().invoke(command, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


@pytest.fixture
def exported(typed: Typed, demo_bundle: Path) -> str:
    """``hart-export`` where the graphs are there already: engines are missing, and are built unasked."""
    shutil.copytree(demo_bundle, Path("engines/demo"))
    return typed(export, ["--precision", "fp16"])


def test_export_run_compare(typed: Typed, exported: str, demo: Pipeline) -> None:
    (folder,) = Path("engines/demo").glob("tensorrt-*")
    assert folder.name.startswith(f"tensorrt-{VERSION}-")
    assert f"{folder}: 12 engines built" in exported
    assert "attention fused" in exported

    drawn = json.loads(typed(run, [*ENGINES, PROMPT, "--json"]))
    assert (drawn["backend"], drawn["device"]) == ("tensorrt", "cuda")
    with Image.open(drawn["images"][0]["path"]) as picture:
        found = np.asarray(picture, float)
    assert np.abs(found - np.asarray(demo(PROMPT)[0], float)).mean() < 2

    # ONNX Runtime looks into the layers, and has no CUDA here.
    said = typed(compare, [*ENGINES, "--num-prompts", "1", "--layers", "sample"])
    assert "within tolerance" in said
    assert "sample at " in said
    report = json.loads(Path("compare-report/report.json").read_text())
    assert report["passed"]
    candidate = report["runs"][0]["candidate"]
    assert (candidate["backend"], candidate["device"]) == ("tensorrt", "cuda")
    assert candidate["arithmetic"] == "float16"


def test_bench(typed: Typed, exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fresh process finds the same stand-ins; the device's peak is measured on small graphs."""
    monkeypatch.setenv("HART_STANDINS", f"tensorrt={VERSION}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, SITE)))
    monkeypatch.setitem(peak.LOADS, "cuda", ((256, 1 << 16),))
    monkeypatch.setattr(peak, "SECONDS", 0.0)
    typed(bench, [*ENGINES, "--iterations", "1", "--warmup", "1", "--output", "result"])
    result = json.loads(Path("result/bench.json").read_text())
    assert (result["backend"], result["device"]) == ("tensorrt", "cuda")
    assert result["first_pictures"][0]["total"] > 0
    assert {TRANSFORMER, DECODER} <= {*result["breakdown"]["graphs"]}


@pytest.mark.gpu_standin
def test_export_from_nothing_builds_too(typed: Typed) -> None:
    said = typed(export, ["--precision", "fp16"])
    assert "13 graphs, fp16" in said
    assert "12 engines built" in said
    assert json.loads(typed(run, [*ENGINES, PROMPT, "--json"]))["backend"] == "tensorrt"
