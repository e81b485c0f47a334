"""The rules of a GPU and its libraries, each broken once on the stand-ins, as a careless executor would."""

from __future__ import annotations

import contextlib
import enum
import gc
import importlib.util
import inspect
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.strict import arithmetic, install_cuda, install_onnx_gpu, install_tensorrt
from tests.strict.api import RTX, face, members, table, versions
from tests.strict.cuda import CudaRuntime
from tests.strict.cuda_names import cudaError_t as Status
from tests.strict.cuda_names import cudaMemcpyKind, cudaStreamCaptureMode
from tests.strict.device import StrictCuda
from tests.strict.memory import array_at
from tests.strict.onnx_gpu import StrictOnnx
from tests.strict.rules import BrokenRule
from tests.strict.tensorrt import StrictTensorRT

UP, DOWN = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost
GLOBAL = cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
LOCAL = cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


@contextlib.contextmanager
def breaks(cuda: StrictCuda, number: int) -> Iterator[None]:
    """What is inside breaks a rule, and the stand-in says which."""
    with pytest.raises(BrokenRule, match=f"^rule {number}: ") as caught:
        yield
    assert caught.value.number == number
    cuda.broken.clear()


class Host:
    """One stream and a few kilobytes, asked for as an executor does."""

    def __init__(self, cuda: StrictCuda) -> None:
        from cuda.bindings import runtime

        self.cuda, self.api = cuda, runtime
        self.stream = self.ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.a, self.b = (self.ok(runtime.cudaMalloc(1024)) for _ in range(2))
        self.pinned = self.ok(runtime.cudaMallocHost(1024))
        self.floats(self.pinned)[:] = 7

    @staticmethod
    def ok(answer: tuple[Any, ...]) -> Any:
        assert answer[0] == Status.cudaSuccess, answer
        return answer[1] if len(answer) > 1 else None

    @staticmethod
    def floats(address: int) -> NDArray[Any]:
        return array_at(address, (256,), np.dtype(np.float32))

    def upload(self, to: int | None = None, stream: Any = None) -> None:
        on = self.stream if stream is None else stream
        self.ok(self.api.cudaMemcpyAsync(self.a if to is None else to, self.pinned, 1024, UP, on))

    def between(self, stream: Any = None) -> None:
        on = self.stream if stream is None else stream
        kind = cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.ok(self.api.cudaMemcpyAsync(self.b, self.a, 1024, kind, on))

    def wait(self) -> None:
        self.ok(self.api.cudaStreamSynchronize(self.stream))

    def begin(self, mode: Any = LOCAL) -> None:
        self.ok(self.api.cudaStreamBeginCapture(self.stream, mode))

    def captured(self) -> Any:
        """A copy from a to b that can be launched."""
        self.begin()
        self.between()
        graph = self.ok(self.api.cudaStreamEndCapture(self.stream))
        launchable = self.ok(self.api.cudaGraphInstantiate(graph, 0))
        self.ok(self.api.cudaGraphDestroy(graph))
        return launchable


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StrictCuda:
    return install_cuda(monkeypatch)


@pytest.fixture
def host(cuda: StrictCuda) -> Host:
    return Host(cuda)


def test_every_rule_has_its_test() -> None:
    found = {int(n) for n in re.findall(r"^def test_rule_(\d\d)\(", Path(__file__).read_text(), re.MULTILINE)}
    assert found == {*range(1, 41)}


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")
def test_the_runtime_is_the_real_one_s() -> None:
    """No function that cuda-python lacks, the same arguments, the same numbers."""
    from cuda.bindings import runtime as real

    played = CudaRuntime(StrictCuda(()))
    for name in dir(played):
        theirs, ours = getattr(real, name), getattr(played, name)
        if isinstance(ours, type) and issubclass(ours, enum.Enum):
            assert {k: v.value for k, v in ours.__members__.items()}.items() <= {
                k: v.value for k, v in theirs.__members__.items()
            }.items(), name
        elif isinstance(ours, int):
            assert ours == theirs, name
        elif not isinstance(ours, type):
            taken = re.findall(r"(\w+)(?:: \w+)?[,)]", theirs.__doc__.splitlines()[0])
            assert taken == [*inspect.signature(ours).parameters], name


def test_rule_01(host: Host) -> None:
    """Work happens when somebody waits."""
    assert np.isnan(host.floats(host.a)).all(), "fresh memory"
    host.upload()
    host.between()
    assert np.isnan(host.floats(host.b)).all()
    assert host.api.cudaStreamQuery(host.stream) == (Status.cudaErrorNotReady,)
    host.wait()
    assert (host.floats(host.b) == 7).all()
    assert host.cuda.counts.uploads == 1
    assert host.cuda.counts.waits == {"cudaStreamSynchronize": 1}


@pytest.mark.parametrize("mode", [GLOBAL, LOCAL])
def test_rule_02(host: Host, mode: Any) -> None:
    """No waiting and no new memory while a stream is capturing."""
    event, pageable = host.ok(host.api.cudaEventCreate()), np.zeros(4, np.float32)
    for name, arguments in {
        "cudaMalloc": (8,),
        "cudaFree": (host.b,),
        "cudaMallocHost": (8,),
        "cudaHostAlloc": (8, 0),
        "cudaFreeHost": (host.pinned,),
        "cudaMemcpy": (pageable, host.a, 16, DOWN),
        "cudaMemset": (host.a, 0, 16),
        "cudaStreamSynchronize": (host.stream,),
        "cudaDeviceSynchronize": (),
        "cudaEventSynchronize": (event,),
    }.items():
        host.begin(mode)
        host.between()
        answer = getattr(host.api, name)(*arguments)
        assert answer[0] == Status.cudaErrorStreamCaptureUnsupported, name
        assert host.api.cudaGetLastError() == (answer[0],)
        assert host.api.cudaStreamEndCapture(host.stream) == (
            Status.cudaErrorStreamCaptureInvalidated,
            None,
        ), name
    host.upload()
    host.wait()  # the stream is as good as new


def test_rule_03(host: Host) -> None:
    """In global mode other threads spoil a capture as well."""

    def elsewhere() -> Any:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(host.api.cudaMalloc(8)))
        thread.start()
        thread.join()
        return answers[0][0]

    host.begin(LOCAL)
    assert elsewhere() == Status.cudaSuccess
    host.ok(host.api.cudaStreamEndCapture(host.stream))
    host.begin(GLOBAL)
    assert elsewhere() == Status.cudaErrorStreamCaptureUnsupported
    assert host.api.cudaStreamEndCapture(host.stream)[0] == Status.cudaErrorStreamCaptureInvalidated


def test_rule_04(host: Host) -> None:
    """A failed capture has to be ended before the stream is of any use."""
    host.begin()
    assert host.api.cudaStreamBeginCapture(host.stream, LOCAL) == (Status.cudaErrorIllegalState,)
    host.api.cudaMalloc(8)
    invalid = Status.cudaErrorStreamCaptureInvalidated
    assert host.api.cudaMemcpyAsync(host.a, host.pinned, 1024, UP, host.stream) == (invalid,)
    assert host.api.cudaStreamSynchronize(host.stream) == (invalid,)
    assert host.api.cudaStreamQuery(host.stream) == (invalid,)
    assert host.api.cudaStreamEndCapture(host.stream) == (invalid, None)
    assert host.api.cudaStreamEndCapture(host.stream) == (Status.cudaErrorIllegalState, None)
    host.upload()


def test_rule_05(host: Host) -> None:
    """What is recorded runs at each launch, on what its addresses hold then."""
    launchable = host.captured()
    host.upload()
    host.wait()
    assert np.isnan(host.floats(host.b)).all()
    for value in (1, 2):
        host.floats(host.pinned)[:] = value
        host.upload()
        host.ok(host.api.cudaGraphLaunch(launchable, host.stream))
        host.wait()
        assert (host.floats(host.b) == value).all()
    assert host.cuda.counts.launches == 2


def test_rule_06(host: Host) -> None:
    """No address after its free, nor past its allocation."""
    with breaks(host.cuda, 6):
        host.api.cudaMemcpyAsync(host.a + 512, host.pinned, 1024, UP, host.stream)
    with breaks(host.cuda, 6):
        host.api.cudaMemsetAsync(host.a - 1, 0, 8, host.stream)
    with breaks(host.cuda, 6):
        host.api.cudaMemcpyAsync(host.pinned, host.pinned, 8, UP, host.stream)
    launchable = host.captured()
    host.ok(host.api.cudaFree(host.a))
    again = host.ok(host.api.cudaMalloc(1024))  # perhaps at the same address
    with breaks(host.cuda, 6):
        host.api.cudaGraphLaunch(launchable, host.stream)
    host.ok(host.api.cudaFree(again))
    with breaks(host.cuda, 6):
        host.api.cudaFree(again)


def test_rule_07(host: Host) -> None:
    """No free of what work in flight uses."""
    host.upload()
    with breaks(host.cuda, 7):
        host.api.cudaFree(host.a)
    host.ok(host.api.cudaFree(host.b))
    host.wait()
    host.ok(host.api.cudaFree(host.a))


def test_rule_08(host: Host) -> None:
    """Copies to the device come from page-locked memory, which stays as it is until they ran."""
    pageable = np.zeros(256, np.float32)
    with breaks(host.cuda, 8):
        host.api.cudaMemcpyAsync(host.a, pageable.ctypes.data, 1024, UP, host.stream)
    host.upload()
    host.floats(host.pinned)[5] = 8
    with breaks(host.cuda, 8):
        host.wait()


def test_rule_09(host: Host) -> None:
    """The host's side of a copy lives until it ran."""
    array = np.empty(256, np.float32)
    host.ok(host.api.cudaMemcpyAsync(array.ctypes.data, host.a, 1024, DOWN, host.stream))
    host.wait()
    assert host.cuda.counts.waits["cudaMemcpyAsync to pageable memory"] == 1, "CUDA waits at once"
    host.ok(host.api.cudaMemcpyAsync(array.ctypes.data, host.a, 1024, DOWN, host.stream))
    del array
    with breaks(host.cuda, 9):
        host.wait()
    with breaks(host.cuda, 9):
        gone = np.empty(256, np.float32).ctypes.data
        host.api.cudaMemcpyAsync(gone, host.a, 1024, DOWN, host.stream)
    host.upload()
    with breaks(host.cuda, 9):
        host.api.cudaFreeHost(host.pinned)


def test_rule_10(host: Host) -> None:
    """No copy of pageable memory is captured."""
    pageable = np.zeros(256, np.float32)
    host.begin()
    with breaks(host.cuda, 10):
        host.api.cudaMemcpyAsync(host.a, pageable.ctypes.data, 1024, UP, host.stream)
    host.upload()


def test_rule_11(host: Host) -> None:
    """A non-blocking stream has no order with the default stream, nor with another one without an event."""
    with breaks(host.cuda, 11):
        host.api.cudaMemsetAsync(host.a, 0, 8, 0)
    host.upload()
    with breaks(host.cuda, 11):
        host.api.cudaMemset(host.a, 0, 8)
    other = host.ok(host.api.cudaStreamCreateWithFlags(1))
    with breaks(host.cuda, 11):
        host.between(other)
    event = host.ok(host.api.cudaEventCreateWithFlags(2))
    host.ok(host.api.cudaEventRecord(event, host.stream))
    host.ok(host.api.cudaStreamWaitEvent(other, event, 0))
    host.between(other)
    host.ok(host.api.cudaStreamSynchronize(other))
    assert (host.floats(host.b) == 7).all(), "the other stream came as far as the event"


def test_rule_12(host: Host) -> None:
    """Everything is given back, and nothing that is awaited."""
    other = host.ok(host.api.cudaStreamCreateWithFlags(1))
    event = host.ok(host.api.cudaEventCreate())
    host.upload()
    host.ok(host.api.cudaEventRecord(event, host.stream))
    host.ok(host.api.cudaStreamWaitEvent(other, event, 0))
    with breaks(host.cuda, 12):
        host.api.cudaEventDestroy(event)
    with breaks(host.cuda, 12):
        host.api.cudaStreamDestroy(host.stream)
    host.ok(host.api.cudaStreamSynchronize(other))
    host.wait()
    host.ok(host.api.cudaEventDestroy(event))
    with breaks(host.cuda, 12):
        host.api.cudaEventRecord(event, host.stream)
    launchable = host.captured()
    assert host.cuda.alive() == {
        "streams": 2,
        "graph execs": 1,
        "allocations": 2,
        "page-locked buffers": 1,
    }
    with breaks(host.cuda, 12):
        host.cuda.finish()
    host.ok(host.api.cudaGraphExecDestroy(launchable))
    for address in (host.a, host.b):
        host.ok(host.api.cudaFree(address))
    host.ok(host.api.cudaFreeHost(host.pinned))
    for stream in (other, host.stream):
        host.ok(host.api.cudaStreamDestroy(stream))
    host.cuda.finish()


def test_rule_13(host: Host) -> None:
    """Only events that were recorded and have come have a time."""
    first, second = (host.ok(host.api.cudaEventCreate()) for _ in range(2))
    untimed = host.ok(host.api.cudaEventCreateWithFlags(2))
    invalid = Status.cudaErrorInvalidResourceHandle
    assert host.api.cudaEventElapsedTime(first, second) == (invalid, None)
    for event in (first, second, untimed):
        host.ok(host.api.cudaEventRecord(event, host.stream))
    assert host.api.cudaEventElapsedTime(first, second) == (Status.cudaErrorNotReady, None)
    assert host.api.cudaEventQuery(second) == (Status.cudaErrorNotReady,)
    host.ok(host.api.cudaEventSynchronize(second))
    assert host.ok(host.api.cudaEventElapsedTime(first, second)) >= 0
    assert host.api.cudaEventElapsedTime(first, untimed) == (invalid, None)


def test_rule_14(host: Host) -> None:
    """A captured graph is not destroyed in flight, nor launched after its end."""
    launchable = host.captured()
    host.upload()
    host.ok(host.api.cudaGraphLaunch(launchable, host.stream))
    with breaks(host.cuda, 14):
        host.api.cudaGraphExecDestroy(launchable)
    host.wait()
    host.ok(host.api.cudaGraphExecDestroy(launchable))
    with breaks(host.cuda, 14):
        host.api.cudaGraphLaunch(launchable, host.stream)


def test_rule_15(host: Host) -> None:
    """A lost device answers every call alike, and nobody asks for ever."""
    lost = Status.cudaErrorIllegalAddress
    host.cuda.fail("cudaStreamSynchronize", 2, lost, sticky=True)
    host.wait()
    assert host.api.cudaStreamSynchronize(host.stream) == (lost,)
    assert host.api.cudaMalloc(8) == (lost, None)
    assert host.api.cudaFree(host.a) == (lost,)
    assert host.api.cudaGetLastError() == host.api.cudaGetLastError() == (lost,)
    with breaks(host.cuda, 15):
        while host.api.cudaStreamQuery(host.stream)[0] != Status.cudaSuccess:
            pass


def test_rule_16(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be out at any call, and be there at the next."""
    host.cuda.fail("cudaMalloc", 2, Status.cudaErrorMemoryAllocation)
    host.ok(host.api.cudaMalloc(8))
    assert host.api.cudaMalloc(8) == (Status.cudaErrorMemoryAllocation, None)
    host.ok(host.api.cudaMalloc(8))
    small = Host(install_cuda(monkeypatch, memory=4096))
    assert small.api.cudaMalloc(4096) == (Status.cudaErrorMemoryAllocation, None)
    assert small.api.cudaMemGetInfo() == (Status.cudaSuccess, 2048, 4096)
    small.ok(small.api.cudaFree(small.a))
    small.ok(small.api.cudaMalloc(3072))
    assert small.cuda.counts.peak == 4096


def test_rule_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is too old is another thing than no GPU."""
    for options, expected in (
        ({"driver": 12040}, Status.cudaErrorInsufficientDriver),
        ({"cards": ()}, Status.cudaErrorNoDevice),
    ):
        install_cuda(monkeypatch, **options)  # type: ignore[arg-type]
        from cuda.bindings import runtime

        assert runtime.cudaGetDeviceCount() == (expected, None)
        assert runtime.cudaMalloc(8) == (expected, None)


def test_rule_18(host: Host) -> None:
    """An allocation lies at a multiple of 256, and nothing says of how much more."""
    for nbytes in (1, 100, 5000, 1 << 20):
        address = host.ok(host.api.cudaMalloc(nbytes))
        assert address % 512 == 256
        assert (address + 128) % 256 == 128, "a part of it is as aligned as its offset"


# TensorRT

FLOAT, HALF, INT64 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.INT64)
Tensors = dict[str, tuple[int, list[int | str]]]
Q: list[int | str] = [1, 2, 2, 4]
"""Shape of queries, keys and values."""
TWICE = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "t"], ["y"])]
"""A product, doubled, so that something lies between input and output."""
LARGEST = [helper.make_node("TopK", ["x", "k"], ["y", "i"])]


def model_of(
    nodes: list[Any],
    inputs: Tensors,
    outputs: Tensors,
    weights: dict[str, Any] | None = None,
    opset: int = 23,
) -> onnx.ModelProto:
    for number, node in enumerate(nodes):
        node.name = node.name or f"node{number}"
    fed, made = (
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in given.items()]
        for given in (inputs, outputs)
    )
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "small", fed, made, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def twice(kind: int = FLOAT, w: float = 1) -> onnx.ModelProto:
    """Any number of rows, each times w, doubled."""
    weights = {"w": np.full((1, 1), w, helper.tensor_dtype_to_np_dtype(kind))}
    return model_of(TWICE, {"x": (kind, ["n", 1])}, {"y": (kind, ["n", 1])}, weights)


def largest() -> onnx.ModelProto:
    """The k largest of eight."""
    outputs: Tensors = {"y": (FLOAT, [1, "k"]), "i": (INT64, [1, "k"])}
    return model_of(LARGEST, {"x": (FLOAT, [1, 8]), "k": (INT64, [1])}, outputs)


ROWS = {"x": ((1, 1), (4, 1), (64, 1))}
MORE_ROWS = {"x": ((65, 1), (65, 1), (128, 1))}


class Library:
    """A strict TensorRT, used as a builder and an executor use it."""

    def __init__(self, trt: StrictTensorRT) -> None:
        self.trt, self.api = trt, trt.api
        self.runtimes: list[Any] = []
        self.logger = trt.api.Logger(trt.api.Logger.ERROR)

    def parsed(self, builder: Any, model: onnx.ModelProto) -> tuple[Any, list[str]]:
        typed = getattr(self.api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # noqa: B009
        network = builder.create_network(1 << int(typed))
        parser = self.api.OnnxParser(network, self.logger)
        parser.parse(model.SerializeToString())
        return network, [parser.get_error(i).desc() for i in range(parser.num_errors)]

    def build(
        self, model: onnx.ModelProto, *profiles: Any, k: Any = None, setup: Any = lambda config: None
    ) -> bytes | None:
        builder = self.api.Builder(self.logger)
        network, errors = self.parsed(builder, model)
        assert errors == []
        config = builder.create_builder_config()
        setup(config)
        for shapes in profiles or ({},):
            profile = builder.create_optimization_profile()
            for name, ranges in shapes.items():
                profile.set_shape(name, *ranges)
            if k:
                profile.set_shape_input("k", *k)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        return None if plan is None else bytes(plan)

    def load(self, plan: bytes | None) -> Any:
        """An engine; what it depends on lives as long as this object."""
        assert plan is not None
        self.runtimes.append(self.api.Runtime(self.logger))
        return self.runtimes[-1].deserialize_cuda_engine(plan)

    def context(self, engine: Any) -> Any:
        return engine.create_execution_context(self.api.ExecutionContextAllocationStrategy.USER_MANAGED)


class Running(Host):
    """A context of :func:`twice` that has all it wants."""

    def __init__(self, trt: StrictTensorRT, model: onnx.ModelProto | None = None, **build: Any) -> None:
        super().__init__(trt.cuda)
        self.library = Library(trt)
        profiles = (ROWS, MORE_ROWS) if model is None else ()
        self.engine = self.library.load(self.library.build(model or twice(), *profiles, **build))
        self.scratch = self.ok(self.api.cudaMalloc(4096))
        self.context = self.give(self.library.context(self.engine))

    def give(self, context: Any, rows: int = 4) -> Any:
        context.set_device_memory(self.scratch, 4096)
        assert context.set_input_shape("x", (rows, 1) if "y" not in self.odd() else (1, 8))
        assert context.set_tensor_address("x", self.a)
        assert context.set_tensor_address("y", self.b)
        return context

    def odd(self) -> tuple[str, ...]:
        return ("y",) if self.engine.num_io_tensors > 2 else ()

    def capture(self) -> Any:
        """Run it plainly, then record it."""
        assert self.context.execute_async_v3(int(self.stream))
        self.wait()
        self.begin()
        assert self.context.execute_async_v3(int(self.stream))
        graph = self.ok(self.api.cudaStreamEndCapture(self.stream))
        launchable = self.ok(self.api.cudaGraphInstantiate(graph, 0))
        self.ok(self.api.cudaGraphDestroy(graph))
        return launchable


class Largest(Running):
    """A context of :func:`largest`, with k in page-locked memory."""

    def __init__(self, trt: StrictTensorRT) -> None:
        super().__init__(trt, largest(), k=((1,), (4,), (8,)))
        self.i = self.ok(self.api.cudaMalloc(1024))
        self.k = self.ok(self.api.cudaMallocHost(8))
        self.count()[:] = 2
        assert self.context.set_tensor_address("i", self.i)
        assert self.context.set_tensor_address("k", self.k)

    def count(self) -> NDArray[Any]:
        return array_at(self.k, (1,), np.dtype(np.int64))


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


# ONNX Runtime on CUDA


class Session(Host):
    """A graph opened as the executor opens it, and addresses to run it on."""

    def __init__(self, onnx_gpu: StrictOnnx, path: Path, model: onnx.ModelProto, **options: str) -> None:
        super().__init__(onnx_gpu.cuda)
        import onnxruntime

        onnx.save(model, path / "graph.onnx")
        given = {"user_compute_stream": str(int(self.stream)), "enable_cuda_graph": "1", **options}
        settings = onnxruntime.SessionOptions()
        settings.enable_mem_pattern = False
        self.onnxruntime = onnxruntime
        self.session = onnxruntime.InferenceSession(
            path / "graph.onnx",
            settings,
            providers=[("CUDAExecutionProvider", given), "CPUExecutionProvider"],
        )

    def run(
        self, number: int, rows: int = 4, to: int | None = None, waits: bool = False, **host: Any
    ) -> None:
        options = self.onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "0" if waits else "1")
        io = self.session.io_binding()
        names = [value.name for value in self.session.get_inputs()]
        shape = (rows, 1) if "k" not in names else (1, 8)
        io.bind_input("x", "cuda", 0, np.float32, shape, self.a)
        for name, array in host.items():
            io.bind_cpu_input(name, array)
        if "k" in names and not host:
            io.bind_input("k", "cuda", 0, np.int64, (1,), self.b)
        io.bind_output("y", "cuda", 0, np.float32, shape if "k" not in names else (1, 2), to or self.b + 256)
        self.session.run_with_iobinding(io, options)


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


def test_rule_38(host: Host) -> None:
    """Between the first scale and the picture the host only asks."""
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
