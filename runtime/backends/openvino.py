"""OpenVINO at planned addresses, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError, parameter
from hart_runtime.common.files import resolved
from hart_runtime.common.install import install
from hart_runtime.common.precisions import INT8
from hart_runtime.common.room import failure
from hart_runtime.common.telemetry import OPENVINO_SENDER, kept_out
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.names import ONNXRUNTIME, OPENVINO
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.contract import DEQUANTIZED
from hart_runtime.runtime.families.names import FAST, TRANSFORMER
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.host import HostMemory, array_at
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.shapes import shape_of
from hart_runtime.runtime.spec import TensorSpec

TOKEN_GROUP = 128
"""Channels of a token that share a scale when OpenVINO turns them into 8-bit integers."""


def openvino() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        with kept_out(OPENVINO_SENDER):
            import openvino
    except ImportError as error:
        mend = f"install it with: {install(OPENVINO)}"
        raise failure(
            f"{parameter('backend', OPENVINO)}: OpenVINO cannot be loaded", str(error), mend
        ) from None
    return openvino


class OpenVinoExecutor(HostMemory):
    """OpenVINO's CPU plugin at host addresses (see :class:`hart_runtime.runtime.memory.executor.Executor`).

    Bundles in float32 and float16 are computed in float32. Those in int8 are read in their second
    form, whose products OpenVINO runs in 8-bit integers with scales of its own.
    """

    name = OPENVINO

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__()
        self._ov = openvino()
        manifest = bundle.manifest
        self._graphs = manifest.graphs
        _require_weights_inside(bundle)
        self._bundle, self._threads = bundle, threads
        self._core = self._ov.Core()
        self._requests = {name: self._opened(name) for name in manifest.required}

    def _opened(self, name: str) -> Any:
        """A graph, compiled."""
        manifest, graph = self._bundle.manifest, self._graphs[name]
        contract = manifest.contract(name)
        reduced = manifest.precision == INT8
        bfloat16 = reduced and "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        path = self._bundle.path(graph.forms.get(DEQUANTIZED, graph.file))
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 and contract.bfloat16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if not reduced or contract.exact_tokens else TOKEN_GROUP,
            **({"INFERENCE_NUM_THREADS": self._threads} if self._threads else {}),
        }
        try:
            compiled = self._core.compile_model(self._core.read_model(path), "CPU", options)
        except Exception as error:  # OpenVINO raises bare RuntimeErrors of many lines
            raise failure(
                f"{path}: OpenVINO {self._ov.__version__} cannot load this graph",
                last_line(error),
                f"use {parameter('backend', ONNXRUNTIME)}",
            ) from None
        request = compiled.create_infer_request()
        if name in (TRANSFORMER, FAST):
            self._begin_with_two_tokens(request, name)
        return request

    def _begin_with_two_tokens(self, request: Any, name: str) -> None:
        """Run a transformer once, where drawings begin with a single token.

        OpenVINO (2026.4) keeps for later shapes what it made of a graph's first one. Where that has one
        token, nothing had to be repeated for every token, and later scales come out wrong.
        """
        dims = self._bundle.manifest.scale_dims(1)[0]
        if dims["length"] == 1:
            two = {**dims, "length": 2, "chosen": 2}
            request.infer(
                {spec.name: np.zeros(shape_of(spec, two), spec.dtype) for spec in self._graphs[name].inputs}
            )

    def _nowhere(self, spec: TensorSpec) -> Any:
        """Room of OpenVINO's own for a result."""
        shape = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
        return self._ov.Tensor(self._ov.Type(np.dtype(spec.dtype)), self._ov.Shape(shape))

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        if graph not in self._requests:
            self._bundle.seal.renew()
            self._requests[graph] = self._opened(graph)
            self._bundle.seal.check()
        request = self._requests[graph]
        try:
            for name, binding in bindings.items():
                request.set_tensor(name, self._ov.Tensor(array_at(binding), shared_memory=True))
            for spec in self._graphs[graph].outputs:
                if spec.name not in bindings:  # nobody wants it now; it would go where it went before
                    request.set_tensor(spec.name, self._nowhere(spec))
            request.infer()
        except Exception as error:  # as above
            raise RunError(f"graph {graph}: {last_line(error)}") from None


def _require_weights_inside(bundle: Bundle) -> None:
    """OpenVINO follows no link out of the folder of a graph, even where both lead to one place.

    Raises:
        InputError: such a link is there, with ways out.
    """
    weights = resolved(bundle.path(WEIGHTS))
    if not weights.is_relative_to(resolved(bundle.folder)):
        raise InputError(
            f"{bundle.path(WEIGHTS)}: is a link to {weights}, which OpenVINO does not follow; use "
            f"{parameter('backend', ONNXRUNTIME)}, or copy the bundle to a folder without links"
        )


def last_line(error: Exception) -> str:
    """Of an exception's text, where OpenVINO says what is wrong behind lines of its own code."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def on_openvino(bundle: Bundle, threads: int | None = None) -> Backend:
    """The OpenVINO backend of a bundle."""
    return PlannedBackend(bundle, OpenVinoExecutor(bundle, threads))
