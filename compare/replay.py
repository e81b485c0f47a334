"""Feeds an engine what the reference fed its graphs, and measures what comes out."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator

from hart_runtime.common.precisions import FP8, FP16, FP32, INT8
from hart_runtime.compare.metrics import Errors, compare_tensors
from hart_runtime.compare.recorded import Call, graph_calls, in_order
from hart_runtime.compare.reference import Reference, error_key
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.contract import Contract
from hart_runtime.runtime.families.names import CODED, CODES, INDEX
from hart_runtime.runtime.families.scales import leaves_tokens_out
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Run
from hart_runtime.runtime.spec import GraphSpec

RELATIVE = 1e-4
"""Allowed error of float32 graphs, over the reference's largest magnitude; at reduced
precision the least that is ever demanded."""
INT8_RELATIVE = 0.2
"""Allowed error of graphs with 8-bit products or convolutions, over the reference's largest magnitude.
Most stay within 0.05; the noisiest denoising step multiplies its error (see docs/accuracy.md)."""
FP8_RELATIVE = 0.2
"""The same of graphs with products in 8-bit floating point."""
INT8_WEIGHTS_RELATIVE = 0.03
"""Allowed error of graphs that round weights alone to 8 bits, over the reference's largest magnitude."""
FACTOR = 2.0
"""Allowed error at reduced precision, in units of the error of torch in fp16."""
HALF_UNIT = 2.0**-10
"""A unit in the last place of half, over the largest magnitude: the least that is demanded of what went
through products in half. A product and its bias are two roundings where a library does not fuse them, and
in a small tensor torch may have been lucky."""

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One output of one graph call, judged."""

    batch: int
    graph: str
    call: str
    output: str
    errors: Errors
    tolerance: float | None
    """What ``errors.error`` may be; None where only the whole loop can tell."""
    passed: bool


class GraphRunner(BaseRunner):  # type: ignore[misc]
    """One graph of a backend as a Polygraphy runner: what is measured is what is deployed."""

    def __init__(self, backend: Backend, graph: str, spec: GraphSpec) -> None:
        super().__init__(name=graph)
        self.backend, self.graph, self.spec = backend, graph, spec

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for tensor in self.spec.inputs:
            shape = [n if isinstance(n, int) else None for n in tensor.shape]
            metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self.backend.run(Run(self.graph, self.graph), feed_dict)
        on_host = OrderedDict((name, self.backend.to_host(value)) for name, value in outputs.items())
        self.inference_time = time.perf_counter() - start
        return on_host


def rounded_relative(contract: Contract, precision: str) -> float | None:
    """Allowed error of a graph with 8-bit products, over the reference's largest; of others None."""
    if precision == INT8 and contract.int8:
        return INT8_WEIGHTS_RELATIVE if contract.exact_tokens else INT8_RELATIVE
    return FP8_RELATIVE if precision == FP8 and contract.fp8 else None


def run_call(runners: dict[str, GraphRunner], call: Call) -> dict[str, NDArray[Any]]:
    """Outputs of one call, through Polygraphy's comparator."""
    runner = runners[call.graph]
    dtypes = {tensor.name: tensor.dtype for tensor in runner.spec.inputs}
    feed = OrderedDict((name, np.asarray(call.inputs[name], dtype)) for name, dtype in dtypes.items())
    results = Comparator.run([runner], data_loader=[feed])
    return dict(results[runner.name][0].items())


def make_runners(backend: Backend, manifest: Manifest) -> dict[str, GraphRunner]:
    return {name: GraphRunner(backend, name, spec) for name, spec in manifest.graphs.items()}


def replay(
    backend: Backend,
    manifest: Manifest,
    reference: Reference,
    precision: str,
    factor: float = FACTOR,
    relative: float = RELATIVE,
    watch: Watch = lambda _: None,
) -> list[Row]:
    """Every graph call of the reference on an engine, in the order of the loop.

    In float32 ("fp32") an engine has to stay within ``relative`` and draw the same indices. In fp16 an
    output may be ``factor`` times as far off as torch in fp16 is, or by :data:`HALF_UNIT`, and so may
    those of graphs in half in fp8; outputs of graphs with 8-bit weights by :func:`rounded_relative`; indices
    are then judged over the whole loop.
    """
    limits = reference.half_errors or {}
    rows = []
    for batch, call, output, errors in errors_of_calls(backend, manifest, reference, watch):
        whole_numbers = errors.reference_max is None and errors.error is not None
        tolerance: float | None = 0.0 if whole_numbers else relative
        contract = manifest.contracts[call.graph]
        if (rounded := rounded_relative(contract, precision)) is not None:
            tolerance = None if whole_numbers else rounded
        elif precision in (FP16, FP8):
            half = limits.get(error_key(batch, call, output), 0.0)
            allowed = factor * half
            tolerance = None if whole_numbers else max(allowed, HALF_UNIT if allowed > relative else relative)
        if precision != FP32 and leaves_tokens_out(call.run):
            tolerance = None  # at a near tie another token takes part
        if precision == INT8 and errors.dtype == "float16" and tolerance is not None:
            tolerance = max(tolerance, HALF_UNIT)  # a cache in half
        fine = errors.error is not None and (tolerance is None or errors.error <= tolerance)
        rows.append(Row(batch, call.graph, call.label, output, errors, tolerance, fine))
    return rows


def errors_of_calls(
    backend: Backend, manifest: Manifest, reference: Reference, watch: Watch = lambda _: None
) -> Iterator[tuple[int, Call, str, Errors]]:
    """Errors of every output of every call.

    Codes are a lookup, so they, and a latent that is made of them, are compared where the index is right;
    where it is not, the index says so.
    """
    runners = make_runners(backend, manifest)
    by_score = manifest.model.prunable and not reference.settings.exact  # so are the tokens of the cache
    for batch, tensors in enumerate(reference.batches):
        for call in graph_calls(tensors, reference.settings, manifest):
            watch(f"{call.graph} {call.label}")
            found = run_call(runners, call)
            for output, recorded in call.outputs.items():
                expected, value = recorded, found[output]
                if output in (CODES, CODED) and value.shape == expected.shape:
                    wrong = found[INDEX] != call.outputs[INDEX]
                    if output == CODED:  # made of all codes of a picture
                        wrong = wrong.any(axis=1)[:, None, None]
                    value = np.where(wrong[..., None], expected, value)
                if by_score:
                    expected, value = in_order(output, expected), in_order(output, value)
                yield batch, call, output, compare_tensors(expected, value, call.slack.get(output, 0.0))


def half_errors(backend: Backend, manifest: Manifest, reference: Reference, watch: Watch) -> dict[str, float]:
    """Errors of torch in fp16 by :func:`error_key`; overflow to infinity counts as none."""
    return {
        error_key(batch, call, output): errors.error
        for batch, call, output, errors in errors_of_calls(backend, manifest, reference, watch)
        if errors.error is not None
    }
