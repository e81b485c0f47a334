"""The rules of ONNX Runtime on CUDA, each broken once on the stand-in, as a careless executor would."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.strict import install_cuda, install_onnx_gpu
from tests.strict.callers import DOWN, FLOAT, INT64, Host, Session, Tensors, breaks, largest, model_of, twice
from tests.strict.device import StrictCuda
from tests.strict.memory import array_at
from tests.strict.onnx_gpu import StrictOnnx


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StrictCuda:
    return install_cuda(monkeypatch)


@pytest.fixture
def onnx_gpu(monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda) -> StrictOnnx:
    return install_onnx_gpu(monkeypatch, cuda)


def test_rule_34(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """A graph with a copy inside is not captured."""
    node = helper.make_node
    shape = {"s": np.array([1])}
    outputs: Tensors = {"y": (FLOAT, [1, "k"])}
    inputs: Tensors = {"x": (FLOAT, [1, 8]), "k": (INT64, [1])}
    detour = model_of(
        [node("Reshape", ["k", "s"], ["n"]), node("TopK", ["x", "n"], ["y", "i"])], inputs, outputs, shape
    )
    size = [node("Shape", ["x"], ["a"], start=0, end=1), node("Cast", ["a"], ["b"], to=FLOAT)]
    divided = model_of(
        [*size, node("Neg", ["x"], ["c"]), node("Div", ["c", "b"], ["y"])],
        {"x": (FLOAT, ["n"])},
        {"y": (FLOAT, ["n"])},
    )
    for model in (detour, divided):
        with pytest.raises(RuntimeError, match="cannot use the graph capture feature"):
            Session(onnx_gpu, tmp_path, model)
        plain = Session(onnx_gpu, tmp_path, model, enable_cuda_graph="0")
        assert [m.name for m in plain.session.get_input_memory_infos()] == ["Cuda"] * len(model.graph.input)
    direct = Session(onnx_gpu, tmp_path, largest())
    assert [m.name for m in direct.session.get_input_memory_infos()] == ["Cuda", "Cpu"]


def test_rule_35(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """A number of a graph belongs to one call, with its addresses, shapes and values."""
    host = Session(onnx_gpu, tmp_path, twice())
    host.upload()
    host.run(1)
    host.run(1)
    host.wait()
    assert host.floats(host.b + 256)[:4].tolist() == [14] * 4
    assert (host.cuda.counts.executions, host.cuda.counts.launches) == (1, 2)
    for other in ({"rows": 5}, {"to": host.b + 512}):
        with breaks(host.cuda, 35):
            host.run(1, **other)  # type: ignore[arg-type]
    host.run(2, rows=5)
    host.wait()
    host.session.release_captured_graph(1)
    with breaks(host.cuda, 35):
        host.run(1)
    k = Session(onnx_gpu, tmp_path, largest())
    k.run(1, k=np.array([2]))
    with breaks(k.cuda, 35):
        k.run(1, k=np.array([3]))
    k.wait()


def test_rule_36(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """A call that is about to be captured runs twice, so that it may not overwrite what it reads."""
    host = Session(onnx_gpu, tmp_path, twice())
    with breaks(host.cuda, 36):
        host.run(1, to=host.a)
    host.run(-1, to=host.a)


def test_rule_37(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """An input that the host reads comes back from the device, if it was put there."""
    host = Session(onnx_gpu, tmp_path, largest())
    host.run(1, k=np.array([2]))
    host.wait()
    host.cuda.count_anew()
    host.run(1, k=np.array([2]))
    assert host.cuda.counts.downloads == 0
    assert not host.cuda.counts.waits
    host.wait()
    host.cuda.count_anew()
    host.floats(host.pinned)[:8] = range(8)
    array_at(host.pinned, (1,), np.dtype(np.int64))[:] = 2
    host.upload(host.b)
    host.run(-1)
    assert host.cuda.counts.downloads == 1
    assert host.cuda.counts.waits == {"run of graph: a copy to the host": 1}
    host.wait()


def test_rule_38(cuda: StrictCuda) -> None:
    """Between the first scale and the picture the host only asks."""
    host = Host(cuda)
    into = host.ok(host.api.cudaMallocHost(1024))
    event = host.ok(host.api.cudaEventCreate())
    with host.cuda.without_waits():
        host.upload()
        host.ok(host.api.cudaEventRecord(event, host.stream))
        for wait in (
            lambda: host.api.cudaStreamSynchronize(host.stream),
            lambda: host.api.cudaEventSynchronize(event),
            host.api.cudaDeviceSynchronize,
            lambda: host.api.cudaMemcpyAsync(into, host.a, 1024, DOWN, host.stream),
        ):
            with breaks(host.cuda, 38):
                wait()
    host.wait()


def test_rule_39(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """TF32 is on until it is switched off, and arenas have a limit together."""
    exact = 1 + 2.0**-12
    for options, expected in (({}, 2.0), ({"use_tf32": "0"}, 2 * exact)):
        host = Session(onnx_gpu, tmp_path, twice(), **options)
        given = host.session.get_provider_options()["CUDAExecutionProvider"]
        assert given["use_tf32"] == options.get("use_tf32", "1")
        host.floats(host.pinned)[:] = exact
        host.upload()
        host.run(-1)
        host.wait()
        assert host.floats(host.b + 256)[0] == np.float32(expected)
    before = onnx_gpu.arena_bytes
    host.run(-1)
    assert onnx_gpu.arena_bytes == before, "what is there is used again"
    onnx_gpu.arena_limit = before + 8
    with breaks(host.cuda, 39):
        host.run(-1, rows=8)
    del host
    gc.collect()
    assert onnx_gpu.cuda.alive().get("reserved bytes", 0) == 0


def test_rule_40(onnx_gpu: StrictOnnx, tmp_path: Path) -> None:
    """A run waits unless it is told not to."""
    host = Session(onnx_gpu, tmp_path, twice())
    host.upload()
    host.run(-1)
    assert not host.cuda.counts.waits
    host.run(-1, waits=True)
    assert host.cuda.counts.waits.total() == 1
    assert (host.floats(host.b + 256)[:4] == 14).all()
