"""The forms of graphs for TensorRT: what its parsers know, and the same pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hart_runtime import Pipeline
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.contract import STANDARD, WRITTEN_OUT
from hart_runtime.runtime.families.names import RESIDUAL_STEP, SAMPLE
from hart_runtime.runtime.tensorrt.package import Package, graph_read
from tests.conftest import ExportOnce
from tests.golden_runs import HERE

OLDEST = json.loads((Path(__file__).parent / "tensorrt_operators.json").read_text())["operators"]
"""Operators and types of the parser of TensorRT 10.1."""
LATER = {
    (10, 12): {"Pow": [*OLDEST["Pow"], "INT32", "INT64"]},  # onnx-tensorrt #1031
    (10, 14): {"Attention": ["FP32", "FP16", "BF16"]},  # 1043
    (10, 15): {"RMSNormalization": ["FP32", "FP16", "BF16"]},  # 1048
}
"""What later versions added, by their release."""
TYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.FLOAT8E4M3FN: "FP8",
}
PROMPTS = ["a red circle on a white background", "a small blue star on a yellow background"]


def known_to(release: tuple[int, int]) -> dict[str, list[str]]:
    added = {name: types for since, more in LATER.items() if since <= release for name, types in more.items()}
    return OLDEST | added


def unknown_in(model: onnx.ModelProto, release: tuple[int, int]) -> Iterator[str]:
    """Nodes whose operator, type of data or domain a parser does not know."""
    table = known_to(release)
    whole = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in [*whole.graph.input, *whole.graph.value_info, *whole.graph.output]
    }
    types |= {tensor.name: tensor.data_type for tensor in whole.graph.initializer}
    for node in whole.graph.node:
        data = node.input[1 if node.op_type == "Where" else 0]  # before it, a condition
        kinds = [TYPES[types[data]]]
        if node.op_type == "Cast":
            kinds.append(TYPES[node.attribute[0].i])
        known = table.get(node.op_type, []) if node.domain in ("", "ai.onnx") else []
        for kind in kinds:
            if kind not in known:
                yield f"{node.name}: {node.op_type} of {kind}"
        if node.op_type == "CumSum" and release < (10, 15):
            yield f"{node.name}: a loop"


def package(version: str) -> Package:
    return Package("tensorrt", version, object())


@pytest.mark.parametrize(
    "version", ["10.3.0", "10.7.0", "10.13.3.9", "10.14.1", "10.15.1", "10.16.1.11", "11.4.0"]
)
@pytest.mark.parametrize(
    ("checkpoint", "precision"),
    [
        (DEMO_CHECKPOINT, "fp16"),
        (HERE / "t2i_main", "fp32"),
        (HERE / "t2i_adaln", "fp32"),
        (HERE / "var_plain", "fp32"),
        (HERE / "var_plain", "fp16"),
        (HERE / "var_plain", "fp8"),
    ],
)
def test_every_version_knows_all_operators(
    export_once: ExportOnce, checkpoint: Path, precision: str, version: str
) -> None:
    bundle = open_bundle(export_once(checkpoint, precision))
    reader = package(version)
    for graph in bundle.manifest.graphs.values():
        file = graph_read(reader, graph)
        model = onnx.load(bundle.path(file), load_external_data=False)
        onnx.checker.check_model(bundle.path(file))
        assert [*unknown_in(model, reader.release)] == [], file
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        assert {*opsets} == {""}, file
        if reader.release < (10, 15):
            assert opsets[""] <= 20, file


def test_the_graphs_own_form_is_not_for_tensorrt(demo_bundle: Path) -> None:
    """Or the test above would find nothing wrong with anything."""
    model = onnx.load(demo_bundle / "transformer.onnx", load_external_data=False)
    found = {line.rpartition(": ")[2] for line in unknown_in(model, (11, 4))}
    assert found == {"MultiHeadAttention of FP16"}
    found = {line.rpartition(": ")[2] for line in unknown_in(model, (10, 3))}
    assert found == {"MultiHeadAttention of FP16", "RMSNormalization of FP32"}
    sums = onnx.load(demo_bundle / "sample.onnx", load_external_data=False)
    assert {line.rpartition(": ")[2] for line in unknown_in(sums, (10, 3))} >= {"a loop"}


def in_form(bundle: Bundle, form: str) -> Bundle:
    """The bundle with a form's graphs in the place of its own."""
    graphs = {k: replace(g, file=g.forms.get(form, g.file)) for k, g in bundle.manifest.graphs.items()}
    assert graphs != bundle.manifest.graphs
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


@pytest.mark.parametrize("form", [WRITTEN_OUT, STANDARD])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_form_draws_the_same(export_once: ExportOnce, form: str, precision: str) -> None:
    """In float32 but for rounding; in half a rounded sum may choose another code here and there."""
    bundle = open_bundle(export_once(DEMO_CHECKPOINT, precision))
    options: dict[str, Any] = {"seed": 5, "smooth": True}
    expected = Pipeline(bundle, on_the_cpu(bundle))(PROMPTS, **options)
    formed = in_form(bundle, form)
    found = Pipeline(formed, on_the_cpu(formed))(PROMPTS, **options)
    for one, other in zip(expected, found, strict=True):
        difference = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
        assert difference.mean() < (0.02 if precision == "fp32" else 1), difference.max()


def test_weights_are_stored_once(export_once: ExportOnce) -> None:
    """The triangles of running sums are all that forms add."""
    folder = export_once(DEMO_CHECKPOINT, "fp16")
    manifest = open_bundle(folder).manifest
    added = 0
    for graph in manifest.graphs.values():
        own, *more = (onnx.load(folder / file, load_external_data=False) for file in graph.files)
        places = [place_of(tensor) for tensor in own.graph.initializer]
        for form in more:
            for tensor in form.graph.initializer:
                if (place := place_of(tensor)) and place not in places:
                    assert tensor.name.startswith("written.triangle"), tensor.name
                    added += int(place[1])
    assert 0 < added < 100_000


def place_of(tensor: onnx.TensorProto) -> tuple[str, str] | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return (entries["offset"], entries["length"]) if entries else None


@pytest.mark.parametrize(("graph", "form"), [(SAMPLE, ""), (SAMPLE, WRITTEN_OUT), (RESIDUAL_STEP, "")])
def test_halves_are_combined_in_float32(demo_bundle: Path, graph: str, form: str) -> None:
    """Guidance multiplies what was rounded: only the sum may be, for the product after it."""
    spec = open_bundle(demo_bundle).manifest.graphs[graph]
    file = spec.forms[form] if form else spec.file
    model = onnx.load(demo_bundle / file, load_external_data=False)
    whole = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = [*whole.graph.input, *whole.graph.value_info, *whole.graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    weighed, found = {"guidance"}, []
    for node in whole.graph.node:
        if node.op_type in {"Add", "Mul", "Sub"} and weighed & {*node.input}:
            weighed |= {*node.output}
            found.append((node.op_type, *(types[name] for name in node.output)))
    assert found[:4] == [(operator, onnx.TensorProto.FLOAT) for operator in ("Add", "Mul", "Mul", "Sub")]
