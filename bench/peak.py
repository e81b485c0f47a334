"""What the device can do: a large matrix product and a large copy, in the benchmarked runtime.

Both are graphs of a bundle of their own, opened by the same backend with the same device and
threads as the pictures, so the peak is that of the runtime and not only of the hardware.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.bench.timing import TimedBackend
from hart_runtime.runtime.backends.names import MODULES, parse_device
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, describe_files
from hart_runtime.runtime.find import WEIGHTS
from hart_runtime.runtime.memory.gpu import present_gpu
from hart_runtime.runtime.program import Run
from hart_runtime.runtime.spec import GraphSpec, TensorSpec
from hart_runtime.runtime.tensorrt.build import build_engines
from hart_runtime.runtime.tensorrt.builder import BuildOptions
from hart_runtime.runtime.tensorrt.package import import_package

OPSET, IR_VERSION = 20, 10
PRODUCT, COPY = "product", "copy"
LOADS = {"cpu": ((2048, 1 << 26),), "cuda": ((1024, 1 << 22), (8192, 1 << 28))}
"""Side of the product and elements of the copy; the larger ones where the smaller are done too soon."""
TOO_SOON = 5e-3
"""Seconds of a product that leave a device half idle."""
SECONDS, LEAST_RUNS = 1.0, 5
"""Each graph is run at least this long and this often; the fastest run counts."""


@dataclass(frozen=True)
class Peak:
    """Best rates of the device, in the bundle's precision."""

    operations: float
    """Operations a second (a multiply-add is two) in a large matrix product."""
    bytes: float
    """Bytes a second, read and written, in a large copy."""

    def or_better(self, other: Peak) -> Peak:
        """The larger of both rates."""
        return Peak(max(self.operations, other.operations), max(self.bytes, other.bytes))


def measure_peak(bundle: Bundle, device: str, threads: int | None, backend: str) -> Peak:
    """Measure both rates.

    Args:
        bundle: whose precision to use.
        device: "cpu", or "cuda" and perhaps the number of a GPU.
    """
    kind, _ = parse_device(device)
    for side, elements in LOADS[kind]:
        product, copy = _timed(bundle, device, threads, backend, side, elements)
        if product > TOO_SOON:
            break
    return Peak(2 * side**3 / product, 2 * 4 * elements / copy)


def _timed(
    bundle: Bundle, device: str, threads: int | None, backend: str, side: int, elements: int
) -> tuple[float, float]:
    """Seconds of a product and of a copy."""
    # Precisions that are not a type of the graph's inputs are compared with float32.
    dtype = np.dtype(bundle.manifest.kind.traced)
    with tempfile.TemporaryDirectory(prefix="hart-bench-") as folder:
        graphs = _write_graphs(Path(folder), side, elements, dtype)
        files = describe_files(Path(folder), [WEIGHTS, *(graph.file for graph in graphs.values())])
        pair = Bundle(Path(folder), replace(bundle.manifest, graphs=graphs, files=files), "")
        if backend in MODULES:
            gpu = present_gpu(parse_device(device)[1])
            build_engines(pair, import_package(backend), BuildOptions(), gpu)
        opened = open_backend(pair, device, threads, backend)
        timed = TimedBackend(opened)
        # Random numbers: a GPU that multiplies ones needs less power, and is faster than it should be.
        rows = np.random.default_rng(1).standard_normal((side, side), np.float32)
        product = _fastest(timed, PRODUCT, rows.astype(dtype))
        return product, _fastest(timed, COPY, np.ones(elements, np.float32))


def _fastest(backend: TimedBackend, graph: str, array: NDArray[Any]) -> float:
    """Seconds of the fastest run; an output is the input, so that nothing is uploaded."""
    on_device = backend.run(Run(graph, graph), {"x": array})["y"]
    seconds: list[float] = []
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or len(seconds) < LEAST_RUNS:
        trace = backend.trace(lambda: backend.run(Run(graph, graph), {"x": on_device}))
        seconds += [span.seconds for span in trace.spans if span.run and span.run.graph == graph]
    return min(seconds)


def _write_graphs(folder: Path, side: int, elements: int, dtype: np.dtype[Any]) -> dict[str, GraphSpec]:
    """``y = x @ weight`` and ``y = -x`` (ONNX Runtime copies without a change on one thread)."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    values = (rng.standard_normal((side, side), np.float32) * side**-0.5).astype(dtype)
    (folder / WEIGHTS).write_bytes(values.tobytes())
    kinds = {kind: helper.np_dtype_to_tensor_dtype(kind) for kind in (dtype, np.dtype(np.float32))}
    weight = TensorProto(
        name="weight", data_type=kinds[dtype], dims=values.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", WEIGHTS), ("offset", 0), ("length", values.nbytes)):
        weight.external_data.add(key=key, value=str(value))

    specs = {}
    for name, operator, initializers, kind, shape in (
        (PRODUCT, helper.make_node("MatMul", ["x", "weight"], ["y"]), [weight], dtype, (side, side)),
        (COPY, helper.make_node("Neg", ["x"], ["y"]), [], np.dtype(np.float32), (elements,)),
    ):
        ends = [helper.make_tensor_value_info(end, kinds[kind], shape) for end in ("x", "y")]
        graph = helper.make_graph([operator], name, ends[:1], ends[1:], initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        tensors = [TensorSpec(end, kind.name, shape) for end in ("x", "y")]
        specs[name] = GraphSpec(f"{name}.onnx", OPSET, tuple(tensors[:1]), tuple(tensors[1:]))
    return specs
