"""The runtime of the played TensorRT: what loads plans, and engines."""

from __future__ import annotations

import ctypes
import json
import weakref
from typing import TYPE_CHECKING, Any

import onnx

from tests.strict import arithmetic
from tests.strict.builder import host_memory
from tests.strict.device import Refused
from tests.strict.plan import Plan, Tensor, read_plan
from tests.strict.rules import BrokenRule

if TYPE_CHECKING:
    from tests.strict.tensorrt import StrictTensorRT

CHUNK = 1 << 20


class IStreamReader:
    """Derived from by who has a plan that is not in memory; read returns how many bytes it wrote."""

    def __init__(self) -> None:
        pass

    def read(self, destination: Any, size: int) -> int:
        raise NotImplementedError


class IStreamReaderV2:
    def __init__(self) -> None:
        pass

    def read(self, destination: Any, num_bytes: int, stream: int) -> int:
        raise NotImplementedError

    def seek(self, offset: int, where: Any) -> bool:
        raise NotImplementedError


def _read_all(reader: Any, *rest: Any) -> bytes:
    """What a reader gives, asked for as TensorRT does: into memory that a capsule names."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    found = bytearray()
    part = (ctypes.c_char * CHUNK)()
    while count := reader.read(capsule(ctypes.addressof(part), None, None), CHUNK, *rest):
        found += part.raw[:count]
    return bytes(found)


class Runtime:
    _trt: StrictTensorRT

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._trt.needs_a_device(logger)
        self._engines: weakref.WeakSet[Any] = weakref.WeakSet()
        gone = weakref.finalize(self, _outlived, self._trt, self._engines, "a Runtime", "an engine of it")
        gone.atexit = False

    @property
    def logger(self) -> Any:
        return self._logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        with self._trt.strictly():
            if isinstance(serialized_engine, getattr(self._trt.api, "IStreamReader", ())):
                content = _read_all(serialized_engine)
            elif isinstance(serialized_engine, getattr(self._trt.api, "IStreamReaderV2", ())):
                content = _read_all(serialized_engine, 0)
            else:
                content = bytes(serialized_engine)
            plan = read_plan(content)
            reason = "the plan is damaged" if plan is None else _foreign(self._trt, plan)
            if plan is None or reason:
                self._trt.log(self._logger, "ERROR", f"deserializeCudaEngine: {reason}")
                return None
            try:
                self._trt.cuda.enter("deserialize_cuda_engine")
                engine = self._trt.make("ICudaEngine", plan, self._logger)
                self._trt.cuda.reserve(engine, plan.weights, engine._device)
            except Refused as refused:
                self._trt.log(self._logger, "ERROR", f"Cuda Runtime ({refused.status.name})")
                return None
            self._engines.add(engine)
            return engine


def _foreign(trt: StrictTensorRT, plan: Plan) -> str:
    """Why a plan does not run here; empty if it does."""
    major, minor = trt.card.capability
    here = f"{major}.{minor}"
    if plan.version != trt.version and not plan.any_version:
        return f"version mismatch: the plan is of {plan.version}, this is {trt.version}"
    if plan.system != trt.system:
        return f"the plan is of {plan.system}, this is {trt.system}"
    if plan.compatibility == "AMPERE_PLUS" and major >= 8:
        return ""
    if here not in plan.capabilities:
        return f"the plan is for compute capability {', '.join(plan.capabilities)}, this device has {here}"
    if not trt.ahead_of_time and plan.compatibility == "NONE" and plan.gpu != trt.card.name:
        return f"the plan is for {plan.gpu}, this is {trt.card.name}"
    return ""


def _outlived(trt: StrictTensorRT, left: Any, what: str, by: str) -> None:
    """Nobody hears an error of what dies, so that it is told at the next call."""
    if len(left):
        trt.cuda.note(BrokenRule(27, "the end", f"{what} died before {by}"))


class ICudaEngine:
    _trt: StrictTensorRT

    def _setup(self, plan: Plan, logger: Any) -> None:
        self._plan, self._logger, self._device = plan, logger, self._trt.cuda.device()
        self._session = arithmetic.session(onnx.load_model_from_string(plan.model), plan.tf32)
        self._contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        gone = weakref.finalize(self, _outlived, self._trt, self._contexts, "an engine", "a context of it")
        gone.atexit = False

    def _tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self._plan.tensors if tensor.name == name)

    @property
    def name(self) -> str:
        return "Unnamed Network 0"

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan.tensors)

    @property
    def num_layers(self) -> int:
        return len(self._plan.layers)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.profiles)

    @property
    def profiling_verbosity(self) -> Any:
        return self._trt.api.ProfilingVerbosity[self._plan.verbosity]

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._trt.api.HardwareCompatibilityLevel[self._plan.compatibility]

    @property
    def refittable(self) -> bool:
        return False

    @property
    def streamable_weights_size(self) -> int:
        return 0

    @property
    def device_memory_size(self) -> int:
        return max(self._plan.scratch)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self._plan.scratch)

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._plan.scratch[profile_index]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.scratch[profile_index]

    def get_tensor_name(self, index: int) -> str:
        return self._plan.tensors[index].name

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.api.Dims([n if isinstance(n, int) else -1 for n in self._tensor(name).shape])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.api.DataType[self._tensor(name).dtype]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.api.TensorIOMode
        return modes.INPUT if self._tensor(name).is_input else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        places = self._trt.api.TensorLocation
        return places.HOST if name in self._plan.on_host else places.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self._plan.on_host

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [self._trt.api.Dims(shape) for shape in self._plan.profiles[profile_index][name]]

    def get_tensor_profile_values(self, name: str, profile_index: int) -> list[list[int]]:
        return [[*values] for values in self._plan.values[profile_index].get(name, ())]

    def create_execution_context(self, strategy: Any = None) -> Any:
        """Takes a strategy, or (where there are such) a runtime configuration."""
        with self._trt.strictly():
            strategies = self._trt.api.ExecutionContextAllocationStrategy
            config: Any = None
            if isinstance(strategy, getattr(self._trt.api, "IRuntimeConfig", ())):
                config = strategy
                strategy = config._strategy
            wanted = strategies.STATIC if strategy is None else strategies(strategy)
            try:
                self._trt.cuda.enter("create_execution_context")
                self._trt.cuda.forbidden("create_execution_context")
                context = self._trt.make("IExecutionContext", self, wanted, config)
                if wanted is not strategies.USER_MANAGED:
                    self._trt.cuda.reserve(context, max(self._plan.scratch), self._device)
            except Refused as refused:
                self._trt.log(self._logger, "ERROR", f"Cuda Runtime ({refused.status.name})")
                return None
            self._contexts.add(context)
            return context

    def create_runtime_config(self) -> Any:
        return self._trt.make("IRuntimeConfig")

    def create_engine_inspector(self) -> Any:
        return self._trt.make("EngineInspector", self._plan)

    def serialize(self) -> Any:
        return host_memory(self._trt, self._plan.serialize())


class EngineInspector:
    _trt: StrictTensorRT

    def _setup(self, plan: Plan) -> None:
        self._plan = plan

    def _told(self, layer: dict[str, Any]) -> Any:
        if self._plan.verbosity == "NONE":
            return ""
        return layer if self._plan.verbosity == "DETAILED" else layer["Name"]

    def get_layer_information(self, layer_index: int, format: Any) -> str:  # noqa: A002
        told = self._told(self._plan.layers[layer_index])
        if self._trt.api.LayerInformationFormat(format).name == "JSON":
            return json.dumps(told)
        return told if isinstance(told, str) else ", ".join(f"{k}: {v}" for k, v in told.items())

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        layers = [self._told(layer) for layer in self._plan.layers]
        if self._trt.api.LayerInformationFormat(format).name == "JSON":
            return json.dumps({"Layers": layers, "Bindings": [t.name for t in self._plan.tensors]})
        return "\n".join(str(layer) for layer in layers)


class IRuntimeCache:
    _trt: StrictTensorRT

    def _setup(self) -> None:
        self._content = self._coming = b""

    def _run(self, kernel: bytes) -> None:
        """What is compiled in the background for a run is there with the next one."""
        self._content, self._coming = self._content + self._coming, b""
        if kernel not in self._content:
            self._coming = kernel

    def serialize(self) -> Any:
        return host_memory(self._trt, self._content or b"empty")

    def deserialize(self, blob: Any) -> bool:
        self._content = bytes(blob)
        return True

    def reset(self) -> bool:
        self._content = b""
        return True


class IRuntimeConfig:
    _trt: StrictTensorRT

    def _setup(self) -> None:
        self._strategy = self._trt.api.ExecutionContextAllocationStrategy.STATIC
        self._cache: Any = None
        self._graphs = getattr(self._trt.api, "CudaGraphStrategy", None)
        self._graphs = self._graphs and self._graphs.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: Any = None) -> None:
        strategies = self._trt.api.ExecutionContextAllocationStrategy
        self._strategy = strategies.STATIC if strategy is None else strategies(strategy)

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy

    def create_runtime_cache(self) -> Any:
        return self._trt.make("IRuntimeCache")

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> Any:
        return self._cache

    @property
    def cuda_graph_strategy(self) -> Any:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, value: Any) -> None:
        self._graphs = self._trt.api.CudaGraphStrategy(value)
