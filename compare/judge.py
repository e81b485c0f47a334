"""Everything there is to measure about one backend."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.install import installed
from hart_runtime.common.precisions import FP16
from hart_runtime.compare import TORCH_FP16
from hart_runtime.compare.recorded import graph_calls
from hart_runtime.compare.reference import Reference
from hart_runtime.compare.replay import Row, Watch, replay
from hart_runtime.compare.report import Candidate, Limits, Run, arithmetic
from hart_runtime.compare.trajectory import free_running, teacher_forced
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.names import CPU, MODULES, ONNXRUNTIME
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.backends.sessions import has_cuda
from hart_runtime.runtime.bundle import Bundle

if TYPE_CHECKING:
    from hart_runtime.compare.layers import LayerReport
    from hart_runtime.compare.record import Source

PACKAGES = {TORCH_FP16: "torch", **MODULES}
"""Backends that are named otherwise than the package they run on."""


def judge(
    name: str,
    bundle: Bundle,
    reference: Reference,
    source: Source | None,
    device: str,
    layers: str | None,
    limits: Limits,
    watch: Watch,
) -> Run:
    """Replay every graph call, then draw whole pictures with and without the reference's tokens.

    With the checkpoint at hand the first graph that fails (or ``layers``, whatever it does) is
    looked into module by module.
    """
    backend = _open(name, bundle, reference, source, device)
    kind = backend.name
    manifest = bundle.manifest
    precision = FP16 if kind == TORCH_FP16 else manifest.precision
    package = PACKAGES.get(kind, kind)
    candidate = Candidate(
        name=manifest.name,
        identity=bundle.identity,
        precision=precision,
        arithmetic=arithmetic(precision, kind, backend.device),
        backend=kind,
        device=backend.device,
        version=f"{package} {import_module(package).__version__}",
    )
    rows = replay(backend, manifest, reference, precision, limits.factor, limits.relative, watch)
    watch("whole pictures")
    subject = (backend, manifest, precision, reference)
    run = Run(
        candidate,
        rows,
        teacher_forced=[teacher_forced(*subject, tensors) for tensors in reference.batches],
        free_running=[free_running(*subject, tensors) for tensors in reference.batches],
        not_run=sorted(set(manifest.graphs) - {row.graph for row in rows}),
    )
    graph = layers or (run.first_failure.graph if run.first_failure else None)
    if graph is None or source is None or kind == TORCH_FP16 or not installed(ONNXRUNTIME):
        return run
    watch(f"the layers of {graph}")
    # It is ONNX Runtime that looks into a graph, which may be here without CUDA beside engines.
    place = backend.device if has_cuda() else CPU
    return replace(run, layers=_look_into(graph, rows, bundle, reference, source, place, limits))


def _look_into(
    graph: str,
    rows: list[Row],
    bundle: Bundle,
    reference: Reference,
    source: Source,
    device: str,
    limits: Limits,
) -> LayerReport:
    """The graph's first call that failed, or its first call."""
    from hart_runtime.compare.layers import find_layer

    mine = [row for row in rows if row.graph == graph]
    if not mine:
        raise InputError(
            f"{parameter('layers', graph)}: the bundle's sampling settings do not use this graph"
        )
    row = next((row for row in mine if not row.passed), mine[0])
    calls = graph_calls(reference.batches[row.batch], reference.settings, bundle.manifest)
    call = next(call for call in calls if (call.graph, call.label) == (row.graph, row.call))
    return find_layer(source, reference, row.batch, call, bundle, device, limits.factor, limits.relative)


def _open(name: str, bundle: Bundle, reference: Reference, source: Source | None, device: str) -> Backend:
    if name == TORCH_FP16:
        if source is None:
            raise InputError(f"{parameter('backend', TORCH_FP16)}: needs the model itself, give `checkpoint`")
        from hart_runtime.compare.record import torch_device
        from hart_runtime.compare.torch_backend import TorchHalfBackend

        return TorchHalfBackend(source, reference.patch_nums, torch_device(device))
    return open_backend(bundle, device, backend=name)
