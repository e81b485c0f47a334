"""Who calls the played libraries in tests of their rules: as an executor does, down to what breaks one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.strict.cuda_names import cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from tests.strict.device import StrictCuda
from tests.strict.memory import array_at
from tests.strict.onnx_gpu import StrictOnnx
from tests.strict.rules import BrokenRule
from tests.strict.tensorrt import StrictTensorRT

Status = cudaError_t
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
