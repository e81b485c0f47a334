"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart.errors import InputError, RunError
from hart.schedule import SamplingSettings
from runtime.backend import Tensor, Value
from runtime.bundle import APPEND, WEIGHTS, Bundle, GraphSpec
from runtime.external_data import external_files

log = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


SHAPE_OPERATORS = frozenset(
    [
        *("Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast"),
        *("Add", "Sub", "Mul", "Div", "Floor", "Equal", "Where", "Identity", "Range", "Expand"),
        *("Constant", "ConstantOfShape"),
    ]
)
"""What arithmetic on shapes is made of."""
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
IN_MEMORY = "add_external_initializers_from_files_in_memory"
"""Newer ONNX Runtimes take the weight file as bytes; the last one for Python 3.10 does not."""


class OnnxRuntimeBackend:
    """ONNX Runtime with IO binding, on the CPU or on CUDA."""

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, strict: bool = False
    ) -> None:
        import onnxruntime as ort

        if device == "cuda":
            if not has_cuda():
                raise InputError(
                    "--device cuda: this ONNX Runtime has no CUDA provider; "
                    "replace onnxruntime with: pip install onnxruntime-gpu"
                )
            ort.preload_dlls(directory="")  # the libraries that PyTorch or NVIDIA's wheels brought
        self._ort = ort
        self.device = device
        self._strict = strict
        options = ort.SessionOptions()
        options.add_session_config_entry(RECORD_PLACEMENT, "1" if device == "cuda" else "0")
        options.log_severity_level = 4  # errors come back as exceptions
        if threads:
            options.intra_op_num_threads = threads
        with _weights(bundle, options):
            self._sessions = {
                name: self._open(bundle, graph, options)
                for name, graph in bundle.manifest.graphs.items()
                if name != APPEND  # the transformer once more, for backends that plan their memory
            }
        self._dtypes = {
            name: {spec.name: np.dtype(spec.dtype) for spec in graph.inputs}
            for name, graph in bundle.manifest.graphs.items()
        }
        self._outputs = {
            name: [spec.name for spec in graph.outputs] for name, graph in bundle.manifest.graphs.items()
        }

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        pass  # ONNX Runtime plans each graph's memory itself

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        session = self._sessions[graph]
        try:
            binding = session.io_binding()
            # Kept until the run is over: older runtimes only borrow the memory behind a value.
            bound = {name: self._upload(v, self._dtypes[graph][name]) for name, v in inputs.items()}
            for name, value in bound.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs[graph]:
                binding.bind_output(name, self.device)
            session.run_with_iobinding(binding)
        except Exception as error:  # as in _open
            raise RunError(f"graph {graph}: {_first_line(error)}") from None
        return dict(zip(self._outputs[graph], binding.get_outputs(), strict=True))

    def split(self, value: Tensor) -> list[Tensor]:
        return list(self.to_host(value)[:, None])

    def to_host(self, value: Value) -> NDArray[Any]:
        return value if isinstance(value, np.ndarray) else np.asarray(value.numpy())

    def _upload(self, value: Value, dtype: np.dtype[Any]) -> Tensor:
        if not isinstance(value, np.ndarray):
            return value
        array = np.ascontiguousarray(value, dtype)
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _open(self, bundle: Bundle, graph: GraphSpec, options: Any) -> Any:
        path = bundle.path(graph.file)
        serialized = path.read_bytes()
        try:
            outside = external_files(serialized) - {WEIGHTS}
        except InputError as error:
            raise InputError(f"{path}: {error}; export the bundle again") from None
        if outside:
            raise InputError(f"{path}: reads {sorted(outside)}, outside the bundle's {WEIGHTS}; refused")
        try:
            session = self._ort.InferenceSession(
                serialized if hasattr(options, IN_MEMORY) else path,
                options,
                providers=self._providers(),
            )
        except Exception as error:  # the runtime's exceptions have no public base class
            raise InputError(
                f"{path}: ONNX Runtime {self._ort.__version__} cannot load this graph "
                f"({_first_line(error)}); export the bundle again"
            ) from None
        for listed, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            if [spec.name for spec in listed] != [value.name for value in found]:
                raise InputError(
                    f"{path}: expected {[spec.name for spec in listed]} as the manifest says, "
                    f"found {[value.name for value in found]}"
                )
        if PROVIDERS[self.device] not in session.get_providers():
            raise InputError(
                f"--device {self.device}: ONNX Runtime could not start its CUDA provider; check the "
                f"driver and CUDA libraries, or use --device cpu"
            )
        if self.device != "cpu":
            self._check_placement(path, session)
        return session

    def _check_placement(self, path: Path, session: Any) -> None:
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return  # before ONNX Runtime 1.24
        parts = session.get_provider_graph_assignment_info()
        found = misplaced((part.ep_name, n.op_type, n.name) for part in parts for n in part.get_nodes())
        if found:
            message = f"{path}: {len(found)} nodes run on the CPU: {', '.join(found[:5])}"
            if self._strict:
                raise InputError(f"--strict: {message}")
            log.warning("%s", message)

    def _providers(self) -> list[str]:
        return list(dict.fromkeys([PROVIDERS[self.device], PROVIDERS["cpu"]]))


@contextlib.contextmanager
def _weights(bundle: Bundle, options: Any) -> Iterator[None]:
    """Hand the weight file to sessions as mapped bytes, where ONNX Runtime can take them."""
    path = bundle.path(WEIGHTS)
    if not hasattr(options, IN_MEMORY):
        yield
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        getattr(options, IN_MEMORY)([WEIGHTS], [view], [len(view)])
        yield


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime comes with CUDA."""
    import onnxruntime as ort

    return PROVIDERS["cuda"] in ort.get_available_providers()


def misplaced(placement: Iterable[tuple[str, str, str]]) -> list[str]:
    """Nodes that compute on the CPU though another provider was asked for.

    ``placement`` holds (provider, operator, node name). ONNX Runtime always keeps the arithmetic
    on shapes on the host; that is not counted.
    """
    return [
        f"{name} ({operator})"
        for provider, operator, name in placement
        if provider == PROVIDERS["cpu"] and operator not in SHAPE_OPERATORS
    ]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
