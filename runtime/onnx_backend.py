"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart.errors import InputError, RunError
from runtime.backend import Tensor, Value
from runtime.bundle import WEIGHTS, Bundle, GraphSpec
from runtime.external_data import external_files

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


IN_MEMORY = "add_external_initializers_from_files_in_memory"
"""Newer ONNX Runtimes take the weight file as bytes; the last one for Python 3.10 does not."""


class OnnxRuntimeBackend:
    """ONNX Runtime with IO binding, on the CPU or on CUDA."""

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int | None = None) -> None:
        import onnxruntime as ort

        self._ort = ort
        self.device = pick_device(device, ort.get_available_providers())
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions
        if threads:
            options.intra_op_num_threads = threads
        with _weights(bundle, options):
            self._sessions = {
                name: self._open(bundle, graph, options) for name, graph in bundle.manifest.graphs.items()
            }
        self._dtypes = {
            name: {spec.name: np.dtype(spec.dtype) for spec in graph.inputs}
            for name, graph in bundle.manifest.graphs.items()
        }
        self._outputs = {
            name: [spec.name for spec in graph.outputs] for name, graph in bundle.manifest.graphs.items()
        }

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
        return session

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


def pick_device(wanted: str, available: list[str]) -> str:
    """Choose "cpu" or "cuda"; "auto" takes CUDA where ONNX Runtime has it."""
    cuda = PROVIDERS["cuda"] in available
    if wanted == "cuda" and not cuda:
        raise InputError(
            "--device cuda: this ONNX Runtime has no CUDA provider; "
            "replace onnxruntime with: pip install onnxruntime-gpu"
        )
    if wanted == "auto":
        return "cuda" if cuda else "cpu"
    return wanted


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
