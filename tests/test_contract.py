"""The contract of the graphs: bundles agree with it, and everything else follows it."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.precisions import PRECISIONS
from hart_runtime.compare.recorded import recorded_names
from hart_runtime.export.graphs import FREE
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import DEQUANTIZED, STANDARD, WRITTEN_OUT, Row, specs_of
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.families.family import Family
from hart_runtime.runtime.families.hart import GRAPHS, NAME
from hart_runtime.runtime.families.names import LATENT, SMOOTH, TEXT_ENCODER
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.manifest import manifest_of
from hart_runtime.runtime.memory.plan import make_plan
from hart_runtime.runtime.spec import ModelSpec
from hart_runtime.runtime.tensorrt.profiles import make_profiles
from tests.conftest import ExportOnce
from tests.golden_runs import HERE
from tests.imports import PACKAGE, sources

MODEL = ModelSpec((1, 2, 3), 2, 24, 2, 700, 4, 48, 7, 5, 8)


@pytest.mark.parametrize(
    ("checkpoint", "precision"),
    [
        (HERE / "t2i_main", "fp32"),
        (HERE / "t2i_adaln", "fp32"),
        (DEMO_CHECKPOINT, "fp16"),
        (DEMO_CHECKPOINT, "int8"),
        (DEMO_CHECKPOINT, "fp8"),
        (HERE / "var_plain", "fp32"),
        (HERE / "var_plain", "int8"),
        (HERE / "var_plain", "fp8"),
    ],
)
def test_what_is_traced_is_the_contract(export_once: ExportOnce, checkpoint: Path, precision: str) -> None:
    """The exporter's own description of every graph: texts with a pooled condition and without, classes."""
    manifest = open_bundle(export_once(checkpoint, precision)).manifest
    llm = manifest.checkpoint["llm"]
    assert manifest.family == ("var" if "num_classes" in llm else NAME)
    modulated = manifest.family == NAME and (not llm["disable_aln"] or llm["shared_aln"])
    assert modulated == (checkpoint.name == "t2i_adaln")
    assert manifest.model.modulated == modulated
    specs = specs_of(manifest.contracts, manifest.model, precision)
    if checkpoint != DEMO_CHECKPOINT:
        specs.pop(TEXT_ENCODER, None)
    assert manifest.graphs == specs
    forms = {form for graph in specs.values() for form in graph.forms}
    assert forms == ({DEQUANTIZED} if precision == "int8" else {WRITTEN_OUT, STANDARD})


def renamed(values: dict[str, Any]) -> None:
    values["graphs"]["context"]["outputs"][1]["name"] = "rotations"


def added(values: dict[str, Any]) -> None:
    values["graphs"]["latent"]["inputs"].append({"name": "gain", "dtype": "float32", "shape": []})


def retyped(values: dict[str, Any]) -> None:
    values["graphs"]["transformer"]["inputs"][-1]["dtype"] = "float32"


def reshaped(values: dict[str, Any]) -> None:
    values["graphs"]["smooth"]["inputs"][0]["shape"][-1] = 7


def removed(values: dict[str, Any]) -> None:
    del values["graphs"]["smooth"]


def unknown(values: dict[str, Any]) -> None:
    values["graphs"]["upscale"] = values["graphs"]["smooth"]


def swapped(values: dict[str, Any]) -> None:
    inputs = values["graphs"]["residual_step"]["inputs"]
    inputs[0], inputs[-1] = inputs[-1], inputs[0]


def moved(values: dict[str, Any]) -> None:
    values["graphs"]["smooth"]["file"] = "sample.onnx"


def reformed(values: dict[str, Any]) -> None:
    values["graphs"]["decoder"]["forms"] = {"dequantized": "decoder.onnx"}


CHANGES: dict[Callable[[dict[str, Any]], None], str] = {
    renamed: "graph context: outputs expected angles float32 ['batch', 16, 32], found rotations",
    added: "graph latent: inputs expected no more, found gain float32 []",
    retyped: "graph transformer: inputs expected past_value_5 float16",
    reshaped: "graph smooth: inputs expected logits float32 ['batch', 'side', 'side', 512], found logits",
    removed: "graphs smooth missing",
    unknown: "graphs upscale unknown",
    swapped: "graph residual_step: inputs expected residual float32",
    moved: "graph smooth: files expected ['smooth.onnx'], found ['sample.onnx']",
    reformed: "graph decoder: files expected ['decoder.onnx'], found ['decoder.onnx', 'decoder.onnx']",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_that_says_otherwise_is_refused(
    demo_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """Before any file of it is read: what the loop feeds would not be what the graph takes."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        open_bundle(folder)
    assert str(caught.value).startswith(f"{folder / MANIFEST}: {CHANGES[change]}")
    assert str(caught.value).endswith("made by another version, export the bundle again")


def test_one_more_input_reaches_everything(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy of the contract: manifest, profiles, plan and bundles of before follow it."""
    latent = GRAPHS[LATENT]
    grown = replace(latent, inputs=(*latent.inputs, Row("gain", ("batch",), recorded="gain")))
    monkeypatch.setitem(GRAPHS, LATENT, grown)
    manifest = manifest_of(NAME, MODEL)
    assert [tensor.name for tensor in manifest.graphs[LATENT].inputs] == ["f_hat", "h", "residual", "gain"]
    (profile,) = make_profiles(manifest, LATENT, (1, 4), per_scale=True)
    assert (profile.shapes["gain"].min, profile.shapes["gain"].max) == ((1,), (4,))
    program = manifest.program(manifest.sampling, 1)
    with pytest.raises(RunError, match="graph latent: the loop does not feed gain, which it takes"):
        make_plan(program)
    assert "gain" in recorded_names(manifest, manifest.sampling)
    with pytest.raises(InputError, match=r"graph latent: inputs expected gain float32 .*, found no more"):
        open_bundle(demo_bundle)


def test_an_input_that_no_graph_takes_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = GRAPHS[SMOOTH]
    monkeypatch.setitem(GRAPHS, SMOOTH, replace(smooth, inputs=smooth.inputs[:-1]))
    manifest = manifest_of(NAME, MODEL)
    with pytest.raises(RunError, match="graph smooth: the loop feeds temperature, which it does not take"):
        make_plan(manifest.program(manifest.sampling, 1))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_rows_are_well_formed(family: Family) -> None:
    for graph in family.graphs.values():
        for rows in (graph.inputs, graph.outputs):
            names = [(row.name, row.prunable) for row in rows]
            assert len(set(names)) == len(names), graph.name
        for row in graph.inputs:
            free = {n for n in row.shape if isinstance(n, str)} & {*FREE, "past + length", "next_side**2"}
            assert free <= set(FREE), row  # what an example can be made of
    specs = specs_of(family.graphs, replace(MODEL, modulated=True), "int8")
    assert all(
        isinstance(n, int) or n in (*FREE, "past + length", "next_side**2")
        for g in specs.values()
        for t in (*g.inputs, *g.outputs)
        for n in t.shape
    )
    assert set(PRECISIONS) == {"fp32", "fp16", "int8", "fp8"}


ELSEWHERE = {
    "common.other_names": 5,
    "bench.gpu": 1,
    "bench.host": 2,
    "bench.peak": 7,
    "bench.plots": 1,
    "bench.scale_cli": 1,
    "common.checkpoint": 1,
    "common.console": 2,
    "common.noise": 2,
    "compare.html": 3,
    "compare.large_scales": 17,
    "compare.layers": 2,
    "compare.record": 3,
    "compare.recorded": 5,
    "compare.rehearsal": 1,
    "compare.report": 2,
    "compare.trajectory": 14,
    "export.attention": 1,
    "hart.demo.report": 1,
    "hart.demo.training": 7,
    "hart.diffusion": 1,
    "hart.find": 2,
    "hart.generate": 7,
    "hart.random_checkpoint": 6,
    "hart.random_weights": 1,
    "hart.safety": 1,
    "hart.var_checkpoint": 1,
    "runtime.call": 3,
    "runtime.cli": 1,
    "runtime.given": 1,
    "runtime.options": 2,
    "runtime.pictures": 3,
    "runtime.pipeline": 4,
    "runtime.stages": 6,
    "runtime.tensorrt.profiles": 1,
    "runtime.text": 2,
    "serve.answers": 1,
    "serve.fields": 8,
    "serve.models": 1,
    "serve.remembered": 1,
    "serve.worker": 1,
    "batch.rows": 2,
    "common.mar_config": 2,
    "common.settings": 1,
    "export.calibration": 1,
    "export.writer": 1,
    "hart.mar_generate": 3,
    "serve.app": 1,
    "serve.uploads": 8,
}
"""Strings that are equal to a graph's or a tensor's name, by module: options, folders, recorded tensors and
words of every day among them. May only shrink."""
TOLD = ("runtime.families.", "export.modules", "export.text_modules")
"""Where names belong: the families, and the modules that compute their graphs."""


def test_names_of_graphs_and_tensors_are_told_once() -> None:
    rows = [row for graph in GRAPHS.values() for row in (*graph.inputs, *graph.outputs)]
    names = {*GRAPHS, *(row.name for row in rows if not row.blocks)}
    found: dict[str, int] = {}
    for module, file in sources().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        strings = [
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        short = module.removeprefix(f"{PACKAGE}.")
        if (count := sum(text in names for text in strings)) and not short.startswith(TOLD):
            found[short] = count
    assert {module: count for module, count in found.items() if count > ELSEWHERE.get(module, 0)} == {}
    assert all(found.get(module) == count for module, count in ELSEWHERE.items()), "the list can shrink"
