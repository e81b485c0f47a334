"""Bundles with 8-bit products: the arithmetic, the pictures, and where they do not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from hart_runtime import Pipeline
from hart_runtime.common.errors import InputError
from hart_runtime.compare.cli import main as hart_compare
from hart_runtime.export.cli import main as hart_export
from hart_runtime.export.quantize import quantize_products, quantize_weight, quantize_weights
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.contract import DEQUANTIZED, PAST
from hart_runtime.runtime.families.names import DECODER
from hart_runtime.runtime.tensorrt.cli import main as hart_build
from tests.conftest import ExportOnce

Array = NDArray[np.float32]
GATES = json.loads((Path(__file__).parent / "gates.json").read_text(encoding="utf-8"))["int8"]


@pytest.fixture(scope="module")
def demo_int8(export_once: ExportOnce) -> Path:
    return export_once(DEMO_CHECKPOINT, "int8")


def product_of(weight: Array, integer: bool = True) -> ir.Model:
    """``y = x @ weight`` as an export in int8 has it, in its first form or in its second."""
    inputs, outputs = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["b", "n", inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    product = ir.node("MatMul", [x, w], name="product")
    y = product.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["b", "n", outputs]), ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=[product], initializers=[w], opset_imports={"": 23}, name="g")
    model = quantize_weights(ir.Model(graph, ir_version=10))
    if integer:
        quantize_products(model)
    kinds = {node.op_type for node in model.graph}
    assert (kinds >= {"MatMul", "DequantizeLinear"}) != integer
    assert ("MatMulIntegerToFloat" in kinds) == integer
    return model


def session_of(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


def by_hand(x: Array, weight: Array) -> Array:
    """The same in whole numbers that cannot overflow."""
    values, columns = quantize_weight(weight)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127), np.float32(1e-30))
    tokens = np.rint(x / scale).astype(np.int64)
    return ((tokens @ values.astype(np.int64)) * columns * scale).astype(np.float32)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "everything at its largest"])
def test_products_are_those_of_whole_numbers(extreme: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 96), np.float32)
    weight = rng.standard_normal((96, 80), np.float32)
    if extreme:  # 255 * 127 + 255 * 127 would not fit into the 16 bits of older processors
        x, weight = np.ones_like(x), np.where(weight > -2, np.float32(1), np.float32(-1))
    found = session_of(product_of(weight)).run(None, {"x": x})[0]
    expected = by_hand(x, weight)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    exact = x @ weight
    assert np.abs(found - exact).max() <= 0.03 * np.abs(exact).max()


def test_the_second_form_multiplies_the_same_weights() -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((2, 5, 96), np.float32), rng.standard_normal((96, 80), np.float32)
    values, columns = quantize_weight(weight)
    model = ir.to_proto(product_of(weight, integer=False))
    # Not by ONNX Runtime: it would round the tokens too.
    outputs: Any = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(outputs[0], x @ (values * columns), rtol=1e-4, atol=1e-4)


def test_a_token_does_not_change_its_neighbours() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((3, 4, 64), np.float32), rng.standard_normal((64, 64), np.float32)
    session = session_of(product_of(weight))
    together = session.run(None, {"x": x})[0]
    for i in range(3):
        assert np.array_equal(session.run(None, {"x": x[i : i + 1]})[0][0], together[i])
    x[1, 2, 0] = np.nan
    x[0, 0] = 0
    spoiled = session.run(None, {"x": x})[0]
    assert np.isnan(spoiled[1, 2]).all()
    assert (spoiled[0, 0] == 0).all()
    others = np.ones((3, 4), bool)
    others[1, 2] = others[0, 0] = False
    assert np.array_equal(spoiled[others], together[others])


def test_the_demo_stays_close_to_the_reference(demo_int8: Path, tmp_path: Path) -> None:
    command = ["--engine", str(demo_int8), "--backend", "onnxruntime", "--backend", "openvino"]
    done = CliRunner().invoke(hart_compare, [*command, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    runs = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["runs"]
    assert [run["candidate"]["arithmetic"] for run in runs] == [
        "8-bit products, the rest in float32",
        "8-bit products, the rest in bfloat16 where the processor has it",
    ]
    for forced in (forced for run in runs for forced in run["teacher_forced"]):
        assert forced["total_agreement"] >= GATES["teacher_forced_index_agreement"]
        assert forced["pictures"]["psnr"] >= GATES["teacher_forced_psnr"]


def test_only_the_large_products_are_integers(demo_int8: Path) -> None:
    manifest = open_bundle(demo_int8).manifest
    assert manifest.precision == "int8"
    for name, graph in manifest.graphs.items():
        contract = manifest.contracts[name]
        assert [*graph.forms] == ([DEQUANTIZED] if contract.int8 else [])
        operator = "MatMulNBits" if contract.exact_tokens else "MatMulIntegerToFloat"
        if name == DECODER:
            operator = "QLinearConv"
        for file in graph.files:
            loaded = ir.load(demo_int8 / file)
            kinds = {node.op_type for node in loaded.graph}
            second = file != graph.file
            integers = kinds & {"MatMulNBits", "MatMulIntegerToFloat", "QLinearConv"}
            assert integers == ({operator} if contract.int8 and not second else set()), file
            if name != DECODER:
                assert ("DequantizeLinear" in kinds) == (second and not contract.exact_tokens), file
            if contract.exact_tokens:
                large = [v for v in loaded.graph.initializers.values() if v.const_value.nbytes >= 128 * 64]
                assert {v.dtype for v in large} == {ir.DataType.UINT8, ir.DataType.FLOAT16}, file


def test_the_cache_is_half_and_widened_with_the_new_tokens(demo_int8: Path) -> None:
    """Old tokens alone could be widened long before, for all blocks at once."""
    graph = ir.load(demo_int8 / "transformer.onnx").graph
    old = [value for value in graph.inputs if value.name.startswith(PAST)]
    assert len(old) == 2 * open_bundle(demo_int8).manifest.model.depth
    assert {value.dtype for value in old} == {ir.DataType.FLOAT16}
    computing = [{use.op_type for use in value.consumers()} - {"Shape"} for value in old]
    assert all(kinds == {"Concat"} for kinds in computing)


@pytest.mark.parametrize("backend", ["auto", "openvino"])  # auto: the CPU, whatever else is here
def test_pictures_do_not_depend_on_their_batch(demo_int8: Path, backend: str) -> None:
    pipeline = Pipeline.load(demo_int8, device="auto", backend=backend)
    prompts = ["a red circle on a white background", "a green ring"]
    together = pipeline.generate(prompts, seed=3, batch=2).images
    for prompt, image in zip(prompts, together, strict=True):
        assert pipeline(prompt, seed=3)[0].tobytes() == image.tobytes()


def test_where_it_does_not_run_it_says_so(demo_int8: Path) -> None:
    bundle = open_bundle(demo_int8)
    with pytest.raises(InputError, match=r"int8 bundle, which runs on the CPU .* `precision='fp16'`"):
        open_backend(bundle, device="cuda")
    with pytest.raises(InputError, match=r"`backend='tensorrt'`: .* int8 bundle"):
        open_backend(bundle, backend="tensorrt")
    done = CliRunner().invoke(hart_build, ["--engine", str(demo_int8)])
    assert (done.exit_code, "only the CPU runs" in done.stderr) == (2, True)
    done = CliRunner().invoke(hart_export, ["--precision", "int8", "--backend", "tensorrt-rtx"])
    assert (done.exit_code, "engines are fp32 or fp16" in done.stderr) == (2, True)
