"""hart-compare, hart-bench and hart-build with a bundle that draws classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hart_runtime.bench.cli import main as bench_main
from hart_runtime.compare.cli import main as compare_main
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.find import find
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.tensorrt.cli import main as build_main
from tests.test_compare import within_float32_gates

GRAPHS = {"context", "transformer", "sample", "smooth", "next_scale", "latent", "decoder", "encoder"}


def compare(bundle: Path, *arguments: object) -> Result:
    given = ["--engine", bundle, "--device", "cpu", *arguments]
    return CliRunner().invoke(compare_main, [str(argument) for argument in given])


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def test_float32_gates(var_bundle: Path, var_model: Path, tmp_path: Path) -> None:
    """Every graph, the smooth one too, and whole pictures with the reference's codes and without."""
    out, reference = tmp_path / "out", tmp_path / "reference"
    done = compare(var_bundle, "--checkpoint", var_model, "--output", out, "--save-reference", reference)
    assert done.exit_code == 0, done.output
    found = report(out)
    assert found["reference"]["prompts"] == [
        "crane bird (0)",
        "tabby cat (1)",
        "Labrador retriever (3)",
        "Cup (5)",
    ]
    (run,) = found["runs"]
    assert {row["graph"] for row in run["graphs"]} == GRAPHS
    within_float32_gates(run)
    again = compare(var_bundle, "--reference", reference, "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("graph", ["context", "transformer", "next_scale"])
def test_layers(var_bundle: Path, var_model: Path, tmp_path: Path, graph: str) -> None:
    """Modules of the reference are found in the graph, by its own names."""
    options = ["--checkpoint", var_model, "--num-prompts", 1, "--layers", graph, "--output", tmp_path / "out"]
    done = compare(var_bundle, *options)
    assert done.exit_code == 0, done.output
    modules = {layer["module"] for layer in report(tmp_path / "out")["runs"][0]["layers"]["layers"]}
    expected = {
        "context": "transformer.blocks.1.ada_lin",
        "transformer": "transformer.blocks.1.attn.proj",
        "next_scale": "transformer.word_embed",
    }
    assert expected[graph] in modules


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_reduced_precision(var_model: Path, tmp_path: Path, precision: str) -> None:
    export_bundle(Request(find(var_model), precision), tmp_path / "bundle")
    out = tmp_path / "out"
    done = compare(tmp_path / "bundle", "--checkpoint", var_model, "--num-prompts", 2, "--output", out)
    (run,) = report(out)["runs"]
    assert all(row["passed"] for row in run["graphs"]), done.output
    assert {row["graph"] for row in run["graphs"]} == GRAPHS
    assert all(forced["failure"] is None for forced in run["teacher_forced"])


def test_another_checkpoint_is_refused(var_bundle: Path, var_model: Path, tmp_path: Path) -> None:
    for given in ([], ["--checkpoint", var_model.parent]):
        done = compare(var_bundle, *given, "--output", tmp_path / "out")
        assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr


def test_the_bench(var_bundle: Path, var_model: Path, tmp_path: Path) -> None:
    options = ["--batch", "1,2", "--iterations", 2, "--warmup", 1, "--threads", 1, "--device", "cpu"]
    against = ["--against", "torch-eager", "--checkpoint", var_model, "--output", tmp_path / "result"]
    given = ["--engine", var_bundle, *options, *against]
    done = CliRunner().invoke(bench_main, [str(argument) for argument in given])
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads((tmp_path / "result" / "bench.json").read_text())
    assert found["bundle"]["starts_at"] == "class: crane (4)"
    names = ["context", *(f"scale {k} {part}" for k in range(3) for part in ("transformer", "sampling"))]
    stages = found["breakdown"]["stages"]
    assert [stage["name"] for stage in stages] == [*names, "decoder", "host"]
    assert all(stage["operations"] > 0 for stage in stages[:-1])
    assert found["against"][0]["name"] == "torch-eager"
    assert (found["against"][0]["psnr"] or 99.0) > 60


def test_a_dry_run_of_engines(var_bundle: Path) -> None:
    done = CliRunner().invoke(build_main, ["--engine", str(var_bundle), "--dry-run", "--batch", "1"])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in open_bundle(var_bundle).manifest.engined)
