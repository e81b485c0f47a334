"""The rules of TensorRT, each broken once on the stand-in, as a careless executor would."""

from __future__ import annotations

import enum
import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.strict import arithmetic, install_cuda, install_tensorrt
from tests.strict.api import RTX, face, members, table, versions
from tests.strict.callers import (
    FLOAT,
    HALF,
    INT64,
    LARGEST,
    MORE_ROWS,
    ROWS,
    Largest,
    Library,
    Q,
    Running,
    Tensors,
    breaks,
    largest,
    model_of,
    twice,
)
from tests.strict.device import StrictCuda
from tests.strict.tensorrt import StrictTensorRT


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StrictCuda:
    return install_cuda(monkeypatch)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda) -> StrictTensorRT:
    return install_tensorrt(monkeypatch, cuda)


@pytest.mark.parametrize("version", versions())
def test_no_class_knows_more_than_the_real_one(cuda: StrictCuda, version: str) -> None:
    trt = StrictTensorRT(cuda, version)
    shown = {name: vars(trt.api)[name] for name in dir(trt.api) if not name.startswith("_")}
    assert len(shown) > 30
    for name, cls in shown.items():
        known = {m for c in cls.__mro__ for m in vars(c) if not m.startswith("_") and c is not enum.Enum}
        if issubclass(cls, enum.Enum):
            known = {*cls.__members__}
            there = table()["enumerations"][name]
            assert known == {m for m, where in there.items() if where == "all" or version in where.split()}
        else:
            assert known <= members(version, name), name
            assert known, name
    config = trt.make("IBuilderConfig", None)
    with pytest.raises(AttributeError):
        config.no_such_setting = 1
    with pytest.raises(TypeError, match=r"no TensorRT has ICudaEngine\.guess"):
        face(version, type("ICudaEngine", (), {"guess": lambda self: 1}))
    with pytest.raises(TypeError, match="takes 'name', the one that plays it 'title'"):
        face(version, type("ICudaEngine", (), {"get_tensor_mode": lambda self, title: 1}))


def test_rtx_s_table_is_the_real_one_s() -> None:
    """The rows of TensorRT-RTX, against the package where it is installed."""
    real = pytest.importorskip("tensorrt_rtx")
    for name in table()["classes"]:
        cls = getattr(real, name, None)
        found = {m for m in dir(cls) if not m.startswith("_") or m in {"__init__", "__getitem__", "__len__"}}
        assert members(RTX, name) == (set() if cls is None else found), name
    for name, there in table()["enumerations"].items():
        known = {m for m, where in there.items() if where == "all" or RTX in where.split()}
        assert known == {*getattr(getattr(real, name, None), "__members__", ())}, name


def test_rule_19(trt: StrictTensorRT) -> None:
    """No run without every address, every shape and scratch."""
    running = Running(trt)
    for given in (
        {"shape", "x", "y"},
        {"shape", "x", "scratch"},
        {"x", "y", "scratch"},
        {"shape", "x", "y", "scratch"},
    ):
        context = running.library.context(running.engine)
        if "scratch" in given:
            context.set_device_memory(running.scratch, 4096)
        if "shape" in given:
            assert context.set_input_shape("x", (1, 1))
        for name in {"x", "y"} & given:
            assert context.set_tensor_address(name, running.a)
        assert context.execute_async_v3(int(running.stream)) == (len(given) == 4), given
        running.wait()
    assert len(trt.printed) == 3
    assert not running.context.execute_async_v3(int(running.stream)) or running.context.infer_shapes() == []


def test_rule_20(trt: StrictTensorRT) -> None:
    """Tensors and scratch at multiples of 256, and enough scratch."""
    running = Running(trt)
    with breaks(trt.cuda, 20):
        running.context.set_tensor_address("x", running.a + 128)
    with breaks(trt.cuda, 20):
        running.context.set_device_memory(running.scratch + 64, 1024)
    needed = running.engine.get_device_memory_size_for_profile_v2(0)
    assert needed == 256 < running.engine.get_device_memory_size_for_profile_v2(1)
    running.context.set_device_memory(running.scratch, needed - 1)
    with breaks(trt.cuda, 20):
        running.context.execute_async_v3(int(running.stream))
    running.context.set_device_memory(running.scratch, needed)
    assert running.context.execute_async_v3(int(running.stream))


def test_rule_21(trt: StrictTensorRT) -> None:
    """A refusal is looked at."""
    running = Running(trt)
    refused = [
        lambda context: context.set_input_shape("x", (65, 1)),
        lambda context: context.set_tensor_address("z", running.a),
        lambda context: context.set_optimization_profile_async(2, int(running.stream)),
    ]
    for ask in refused:
        context = running.give(running.library.context(running.engine))
        assert ask(context) is False
        with breaks(trt.cuda, 21):
            context.execute_async_v3(int(running.stream))
    context = running.give(running.library.context(running.engine))
    assert not context.set_input_shape("x", (65, 1))
    assert context.set_input_shape("x", (64, 1)), "who looks can mend it"
    assert context.execute_async_v3(int(running.stream))


def test_rule_22(trt: StrictTensorRT) -> None:
    """A profile changes neither in flight nor during capture."""
    running = Running(trt)
    assert running.context.execute_async_v3(int(running.stream))
    with breaks(trt.cuda, 22):
        running.context.set_optimization_profile_async(1, int(running.stream))
    running.wait()
    running.begin()
    with breaks(trt.cuda, 22):
        running.context.set_optimization_profile_async(1, int(running.stream))
    running.ok(running.api.cudaStreamEndCapture(running.stream))
    assert running.context.set_optimization_profile_async(1, int(running.stream))
    assert not running.context.execute_async_v3(int(running.stream)), "shapes are another profile's"


def test_rule_23(trt: StrictTensorRT) -> None:
    """A context that was captured stays as it was."""
    running = Running(trt)
    launchable = running.capture()
    assert running.context.set_tensor_address("x", running.a), "the same again changes nothing"
    for change in (
        lambda context: context.set_tensor_address("x", running.b),
        lambda context: context.set_input_shape("x", (5, 1)),
        lambda context: context.set_device_memory(running.scratch, 2048),
        lambda context: context.set_optimization_profile_async(1, int(running.stream)),
    ):
        with breaks(trt.cuda, 23):
            change(running.context)
    running.upload()
    running.ok(running.api.cudaGraphLaunch(launchable, running.stream))
    running.wait()
    assert running.floats(running.b)[:4].tolist() == [14] * 4
    running.ok(running.api.cudaGraphExecDestroy(launchable))
    assert running.context.set_input_shape("x", (5, 1))


def test_rule_24(trt: StrictTensorRT) -> None:
    """What decides shapes lies on the host, in its range, and does not change under a graph."""
    running = Largest(trt)
    network, _ = running.library.parsed(trt.api.Builder(None), largest())
    assert [network.get_input(i).is_shape_tensor for i in range(2)] == [False, True]
    with breaks(trt.cuda, 24):
        running.context.set_tensor_address("k", running.a)
    with breaks(trt.cuda, 24):
        running.context.set_tensor_address("k", np.ones(1, np.int64).ctypes.data)
    running.count()[:] = 9
    assert not running.context.execute_async_v3(int(running.stream))
    running.count()[:] = 2
    running.floats(running.pinned)[:8] = range(8)
    running.upload()
    launchable = running.capture()
    running.ok(running.api.cudaGraphLaunch(launchable, running.stream))
    running.wait()
    assert running.floats(running.b)[:2].tolist() == [7, 6]
    running.count()[:] = 3
    with breaks(trt.cuda, 24):
        running.api.cudaGraphLaunch(launchable, running.stream)


def test_rule_25(trt: StrictTensorRT) -> None:
    """One scratch, and one context, for one thing at a time."""
    running = Running(trt)
    other = running.ok(running.api.cudaStreamCreateWithFlags(1))
    second = running.give(running.library.context(running.engine))
    assert second.set_tensor_address("y", running.ok(running.api.cudaMalloc(1024)))
    assert running.context.execute_async_v3(int(running.stream))
    for context in (second, running.context):
        with breaks(trt.cuda, 25):
            context.execute_async_v3(int(other))
    event = running.ok(running.api.cudaEventCreateWithFlags(2))
    running.ok(running.api.cudaEventRecord(event, running.stream))
    running.ok(running.api.cudaStreamWaitEvent(other, event, 0))
    assert second.execute_async_v3(int(other))


def test_rule_26(trt: StrictTensorRT) -> None:
    """The first run with other shapes is a plain one."""
    running = Running(trt)
    running.begin()
    with breaks(trt.cuda, 26):
        running.context.execute_async_v3(int(running.stream))
    running.ok(running.api.cudaStreamEndCapture(running.stream))
    running.ok(running.api.cudaGraphExecDestroy(running.capture()))
    assert running.context.set_input_shape("x", (7, 1))
    running.begin()
    with breaks(trt.cuda, 26):
        running.context.execute_async_v3(int(running.stream))


def test_rule_27(trt: StrictTensorRT) -> None:
    """Graphs die before their context, a context before its engine, an engine before its runtime."""
    running = Running(trt)
    launchable = running.capture()
    running.context = None
    with breaks(trt.cuda, 27):
        running.api.cudaGetDevice()
    with breaks(trt.cuda, 27):
        running.api.cudaGraphLaunch(launchable, running.stream)
    running = Running(trt)
    running.engine = None
    with breaks(trt.cuda, 27):
        running.wait()
    running = Running(trt)
    running.context = None
    running.library.runtimes.clear()
    with breaks(trt.cuda, 27):
        running.wait()


def test_rule_28(monkeypatch: pytest.MonkeyPatch, trt: StrictTensorRT) -> None:
    """A plan runs on what it was built for."""
    library = Library(trt)
    plan = library.build(twice(), ROWS)
    assert library.load(plan) is not None
    for version, card, system in (
        ("10.13.3.9", {}, trt.system),
        (trt.version, {"capability": (8, 6)}, trt.system),
        (trt.version, {"name": "NVIDIA L40S"}, trt.system),
        (trt.version, {}, "windows-amd64"),
    ):
        other = install_tensorrt(monkeypatch, install_cuda(monkeypatch, **card), version)
        other.system = system
        assert Library(other).load(plan) is None
        assert other.printed
    assert Library(trt).load(b"no plan at all") is None


def test_rule_29(monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda, trt: StrictTensorRT) -> None:
    """What is typed half is rounded to half, whatever computes it; networks keep the types of the graph."""
    nodes = [*(n for n in twice(HALF).graph.node), helper.make_node("Cast", ["y"], ["z"], to=FLOAT)]
    weights = {"w": np.full((1, 1), 16384, np.float16)}
    model = model_of(nodes, {"x": (HALF, [1, 1])}, {"z": (FLOAT, [1, 1])}, weights)
    for x, expected in ((1.5, 49152), (2.0, np.inf), (1.0009765625, 32800)):
        found = arithmetic.compute(arithmetic.session(model, False), {"x": np.full((1, 1), x, np.float16)})
        assert found["z"].item() == expected
    library = Library(trt)
    builder = library.api.Builder(library.logger)
    weak = builder.create_network(0)
    library.api.OnnxParser(weak, library.logger).parse(model.SerializeToString())
    with breaks(cuda, 29):
        builder.build_serialized_network(weak, builder.create_builder_config())
    typed, _ = Library(eleven := StrictTensorRT(cuda, "11.4.0.106")).parsed(eleven.api.Builder(None), model)
    assert (
        eleven.api.Builder(None).build_serialized_network(typed, eleven.make("IBuilderConfig", None))
        is not None
    )


def test_rule_30(trt: StrictTensorRT) -> None:
    """TF32 is on until it is switched off, and rounds what goes into float32 products."""
    flag, exact = trt.api.BuilderFlag.TF32, 1 + 2.0**-12
    kept = []
    for setup, expected in ((lambda config: None, 2.0), (lambda config: config.clear_flag(flag), 2 * exact)):
        running = Running(trt, setup=setup)
        kept.append(running)
        running.floats(running.pinned)[:] = exact
        running.upload()
        assert running.context.execute_async_v3(int(running.stream))
        running.wait()
        assert running.floats(running.b)[0] == np.float32(expected)


def test_rule_31(cuda: StrictCuda) -> None:
    """What each version's parser refuses."""
    node, shape = helper.make_node, [*Q]
    vector: Tensors = {"x": (FLOAT, [4])}
    whole: Tensors = {"x": (INT64, [4])}
    qkv: Tensors = dict.fromkeys("qkv", (HALF, shape))
    flat: Tensors = dict.fromkeys("qkv", (HALF, [1, 2, 8]))
    norm = [node("RMSNormalization", ["x", "g"], ["y"])]
    axes = {"pads": np.array([1, 1]), "axes": np.array([0])}
    cases: dict[str, tuple[onnx.ModelProto, str]] = {
        "MultiHeadAttention": (
            model_of(
                [node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=2)],
                flat,
                {"y": (HALF, [1, 2, 8])},
            ),
            "rtx",
        ),
        "Attention": (
            model_of([node("Attention", ["q", "k", "v"], ["y"])], qkv, {"y": (HALF, shape)}),
            "10.16.1.11 11.4.0.106 rtx",
        ),
        "more than one output": (
            model_of(
                [node("Attention", ["q", "k", "v"], ["y", "", "", "s"])],
                qkv,
                {"y": (HALF, shape), "s": (HALF, [1, 2, 2, 2])},
            ),
            "",
        ),
        "RMSNormalization": (
            model_of(norm, vector, {"y": (FLOAT, [4])}, {"g": np.ones(4, np.float32)}),
            "10.16.1.11 11.4.0.106 rtx",
        ),
        "Pow": (
            model_of([node("Pow", ["x", "two"], ["y"])], whole, {"y": (INT64, [4])}, {"two": np.array(2)}),
            "10.13.3.9 10.16.1.11 11.4.0.106 rtx",
        ),
        "CumSum": (
            model_of([node("CumSum", ["x", "a"], ["y"])], whole, {"y": (INT64, [4])}, {"a": np.array(0)}),
            "rtx",
        ),
        "Pad": (
            model_of([node("Pad", ["x", "pads", "", "axes"], ["y"])], vector, {"y": (FLOAT, [6])}, axes),
            "10.7.0 10.13.3.9 10.16.1.11 11.4.0.106 rtx",
        ),
        "up to 3840": (
            model_of(LARGEST, {"x": (FLOAT, [4096])}, {"y": (FLOAT, [3841])}, {"k": np.array([3841])}),
            "",
        ),
    }
    for words, (model, accepted) in cases.items():
        for version in versions():
            trt = StrictTensorRT(cuda, version)
            library = Library(trt)
            _, errors = library.parsed(library.api.Builder(library.logger), model)
            takes = version in accepted.split() or (version == RTX and accepted.endswith("rtx"))
            assert bool(errors) != takes, (words, version, errors)
            assert takes or words in errors[0] or "No importer" in errors[0]
    trt = StrictTensorRT(cuda, "10.16.1.11")
    assert Library(trt).build(largest(), {}, k=((1,), (8,), (3841,))) is None
    assert "3840" in trt.printed[-1]


def test_a_dropped_input_is_seen(trt: StrictTensorRT) -> None:
    """The importer of attention passes over the lengths of a padded cache, and warns."""
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"])
    inputs: Tensors = dict.fromkeys("qkv", (HALF, Q))
    model = model_of([node], {**inputs, "lengths": (INT64, [1])}, {"y": (HALF, [1, 2, 2, 4])}, opset=24)
    library = Library(trt)
    library.logger = trt.api.Logger(trt.api.Logger.WARNING)
    network, errors = library.parsed(library.api.Builder(library.logger), model)
    assert errors == []
    layer = network.get_layer(0)
    assert [layer.get_input(i).name for i in range(layer.num_inputs)] == ["q", "k", "v"]
    assert trt.printed == ["Unused Input: lengths"]


def test_rule_32(monkeypatch: pytest.MonkeyPatch, cuda: StrictCuda) -> None:
    """TensorRT-RTX captures again whenever a context is another one than it captured."""
    trt = install_tensorrt(monkeypatch, cuda, RTX)
    running = Running(trt)
    config = running.engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.api.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.cuda_graph_strategy = trt.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    context = running.give(running.engine.create_execution_context(config))
    for rows, recaptures in ((4, 0), (4, 0), (5, 1), (4, 2)):
        assert context.set_input_shape("x", (rows, 1))
        assert context.execute_async_v3(int(running.stream))
        assert cuda.counts.recaptures == recaptures


def test_rule_33(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds on a GPU; TensorRT-RTX anywhere, for the capabilities that it knows."""
    nowhere = install_cuda(monkeypatch, cards=())
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        Library(StrictTensorRT(nowhere, "10.16.1.11")).build(twice(), ROWS)
    assert Library(StrictTensorRT(nowhere, RTX)).build(twice(), ROWS) is not None
    hopper = StrictTensorRT(install_cuda(monkeypatch, capability=(9, 0)), RTX)

    def here(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(hopper.api.ComputeCapability.CURRENT, 0)

    assert "SM90" not in hopper.api.ComputeCapability.__members__
    assert Library(hopper).build(twice(), ROWS, setup=here) is None
    assert Library(hopper).load(Library(hopper).build(twice(), ROWS)) is None


def test_a_timing_cache_saves_what_it_knows(trt: StrictTensorRT) -> None:
    library, kept = Library(trt), []

    def with_cache(content: bytes) -> Any:
        def setup(config: Any) -> None:
            kept.append(config)
            assert config.set_timing_cache(config.create_timing_cache(content), False)

        return setup

    library.build(twice(), ROWS, setup=with_cache(b""))
    timed, trt.tactics_timed = trt.tactics_timed, 0
    assert timed == 2
    content = bytes(kept[0].get_timing_cache().serialize())
    library.build(twice(), ROWS, setup=with_cache(content))
    assert trt.tactics_timed == 0
    library.build(twice(), ROWS, MORE_ROWS, setup=with_cache(content))
    assert trt.tactics_timed == 2, "the new profile's"
    elsewhere = StrictTensorRT(trt.cuda, "10.13.3.9")
    config = elsewhere.make("IBuilderConfig", elsewhere.api.Logger())
    assert not config.set_timing_cache(config.create_timing_cache(content), False)


def test_the_inspector_names_fused_attention(trt: StrictTensorRT) -> None:
    """Written out in half it is fused, in float32 its scores are written."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["q", "k"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "v"], ["y"]),
    ]

    library = Library(trt)

    def layers(kind: int) -> tuple[list[Any], int]:
        inputs: Tensors = {"q": (kind, [64, 4]), "k": (kind, [4, 64]), "v": (kind, [64, 4])}
        detailed = trt.api.ProfilingVerbosity.DETAILED
        model = model_of(nodes, inputs, {"y": (kind, [64, 4])})
        engine = library.load(
            library.build(model, setup=lambda c: setattr(c, "profiling_verbosity", detailed))
        )
        told = engine.create_engine_inspector().get_engine_information(trt.api.LayerInformationFormat.JSON)
        return json.loads(told)["Layers"], engine.get_device_memory_size_for_profile_v2(0)

    half, none = layers(HALF)
    assert [layer["Name"].startswith("_gemm_mha_v2") for layer in half] == [True]
    assert none == 0
    single, scratch = layers(FLOAT)
    assert [layer["LayerType"] for layer in single] == ["gemm", "kgen", "gemm"]
    assert scratch == 2 * 64 * 64 * 4
    trt.fuses_attention = False
    assert len(layers(HALF)[0]) == 3
