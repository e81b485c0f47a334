"""Activations as large as published models have: what half cannot hold is scaled before it is summed."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hart_runtime import Pipeline
from hart_runtime.common.errors import RunError
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.families.names import TEXT_ENCODER, TRANSFORMER, UNCONDITIONAL
from hart_runtime.runtime.find import WEIGHTS
from tests.strict import arithmetic, install_cuda, install_onnx_gpu
from tests.test_bundle import reseal
from tests.test_strict_engines import on_a_machine, with_engines

PROMPT = "a red circle on a white background"
LARGE = 300.0
"""A channel of Qwen2's queries and keys. Squared it is past 65504, the largest number of half."""
GAIN = 200.0
"""Makes a channel of the demo's own keys as large, which have no bias that could."""
HEAD_DIM = 32
"""Of the demo's text encoder and of its transformer."""
SLOWEST = HEAD_DIM // 2 - 1
"""The channel of a head that rotary positions turn least."""


def half_attention(scale_first: bool) -> onnx.ModelProto:
    """softmax(q k^T * scale) in half, the scale before or behind the product."""
    steps = [("Mul", ["q", "scale"], "scaled"), ("MatMul", ["scaled", "k"], "scores")]
    if not scale_first:
        steps = [("MatMul", ["q", "k"], "product"), ("Mul", ["product", "scale"], "scores")]
    nodes = [helper.make_node(kind, given, [name]) for kind, given, name in steps]
    nodes.append(helper.make_node("Softmax", ["scores"], ["weights"]))
    half = TensorProto.FLOAT16
    given = [("q", (4, HEAD_DIM)), ("k", (HEAD_DIM, 4))]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, half, shape) for name, shape in given],
        [helper.make_tensor_value_info("weights", half, (4, 4))],
        [numpy_helper.from_array(np.float16(HEAD_DIM**-0.5), "scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_stand_in_shows_scores_that_pass_what_half_holds() -> None:
    """ONNX Runtime's CPU provider, which it computes with, adds them in float32 and sees nothing."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((4, HEAD_DIM), np.float32) for _ in "qk")
    q[:, 0] = k[:, 0] = LARGE
    inputs = {"q": q.astype(np.float16), "k": k.T.astype(np.float16)}
    found = arithmetic.compute(arithmetic.session(half_attention(scale_first=False), tf32=False), inputs)
    assert np.isnan(found["weights"]).all()
    found = arithmetic.compute(arithmetic.session(half_attention(scale_first=True), tf32=False), inputs)
    assert np.allclose(found["weights"].sum(axis=-1, dtype=np.float32), 1, atol=1e-2)


def changed(bundle: Bundle, graphs: Sequence[str], change: Callable[[TensorProto], Any]) -> None:
    """Change initializers that lie in the graphs' own files, in every form of them."""
    for name in graphs:
        for file in bundle.manifest.graphs[name].files:
            model = onnx.load(bundle.folder / file, load_external_data=False)
            count = 0
            for tensor in model.graph.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    continue
                value = change(tensor)
                if value is not None:
                    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
                    count += 1
            if count:
                (bundle.folder / file).write_bytes(model.SerializeToString())
                reseal(bundle.folder, file)


def large_bias(*suffixes: str) -> Callable[[TensorProto], Any]:
    """The slowest channel of every head, of the biases whose names end so."""

    def change(tensor: TensorProto) -> Any:
        if not tensor.name.endswith(suffixes):
            return None
        bias = numpy_helper.to_array(tensor).copy()
        bias[SLOWEST::HEAD_DIM] = LARGE
        return bias

    return change


def large_keys(bundle: Bundle) -> None:
    """The same channel of every block's keys, in the weights that all graphs and forms share."""
    file = bundle.path(bundle.manifest.graphs[TRANSFORMER].file)
    graph = onnx.load(file, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    data = bytearray((bundle.folder / WEIGHTS).read_bytes())
    for node in graph.node:
        if node.op_type == "MatMul" and "qkv_proj" in node.name:
            tensor = tensors[node.input[1]]
            place = {entry.key: entry.value for entry in tensor.external_data}
            count, offset = int(place["length"]) // 2, int(place["offset"])
            both = np.frombuffer(data, np.float16, count, offset).reshape(*tensor.dims)
            queries, keys, _ = np.split(both, 3, axis=1)
            assert queries.base is not None  # a view
            keys[:, SLOWEST::HEAD_DIM] *= np.float16(GAIN)
    (bundle.folder / WEIGHTS).write_bytes(data)
    reseal(bundle.folder, WEIGHTS)


def without_scale(size: float) -> Callable[[TensorProto], Any]:
    """Ones in the place of a scale."""

    def change(tensor: TensorProto) -> Any:
        if tensor.dims or tensor.data_type not in {TensorProto.FLOAT, TensorProto.FLOAT16}:
            return None
        value = numpy_helper.to_array(tensor)
        return np.ones_like(value) if np.isclose(value, size, rtol=1e-3) else None

    return change


@pytest.fixture
def large(demo_bundle: Path, tmp_path: Path) -> Bundle:
    """The demo with channels of queries and keys at about 300 in text encoder and transformer."""
    bundle = open_bundle(Path(shutil.copytree(demo_bundle, tmp_path / "large")))
    changed(bundle, [TEXT_ENCODER], large_bias("q_proj.bias", "k_proj.bias"))
    changed(bundle, [TRANSFORMER, UNCONDITIONAL], large_bias("attn.q_bias"))
    large_keys(bundle)
    return open_bundle(bundle.folder)


Opened = Callable[[Bundle], Backend]


@pytest.fixture(
    params=[
        "onnxruntime",
        "10.3.0",
        "10.16.1.11",
        pytest.param("rtx-1.7.1.116", marks=pytest.mark.gpu_standin),
    ]
)
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Opened]:
    """Every library that reads a form of its own, computing in half as a GPU does."""
    if request.param == "onnxruntime":
        cuda = install_cuda(monkeypatch)
        install_onnx_gpu(monkeypatch, cuda)
        yield lambda bundle: open_backend(bundle, "cuda", backend="onnxruntime")
    else:
        trt = on_a_machine(monkeypatch, request.param)
        cuda = trt.cuda

        def engines(bundle: Bundle) -> Backend:
            name = "tensorrt-rtx" if trt.ahead_of_time else "tensorrt"
            return open_backend(with_engines(bundle, tmp_path / "engines", trt, batches=(1, 1)), backend=name)

        yield engines
    gc.collect()
    cuda.finish()


def test_pictures_are_finite_where_activations_are_large(large: Bundle, opened: Opened) -> None:
    pipeline = Pipeline(large, opened(large))
    features = pipeline.backend.to_host(pipeline.encode([PROMPT])[0])
    assert np.isfinite(features).all()
    assert features.std(axis=1).min() > 0.01, "tokens are still told apart"
    assert np.asarray(pipeline(PROMPT)[0]).std() > 1


@pytest.mark.parametrize("graph", [TEXT_ENCODER, TRANSFORMER])
def test_without_their_scale_they_are_not(
    large: Bundle, graph: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or the test above would show nothing: these sums do pass what half holds."""
    factor = 0.25 if graph == TRANSFORMER else 1.0
    changed(large, [graph], without_scale(factor * HEAD_DIM**-0.5))
    bundle = open_bundle(large.folder)
    trt = on_a_machine(monkeypatch, "10.3.0")
    built = with_engines(bundle, tmp_path / "engines", trt, batches=(1, 1))
    with pytest.raises(RunError, match="NaN"):
        Pipeline.load(built.folder, backend="tensorrt")(PROMPT)
