"""The exported graphs and the torch-free loop against the published code."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.bundle import open_bundle
from runtime.loop import draw
from runtime.onnx_backend import OnnxRuntimeBackend
from tests.conftest import ExportOnce
from tests.golden_runs import Run, compare, runs

FACTOR = 10.0
"""Exported graphs reorder sums, so they get ten times the reference model's tolerance."""


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.label)
def test_replay(run: Run, export_once: ExportOnce) -> None:
    patch_nums = None if run.patch_nums == run.config.patch_nums else run.patch_nums
    bundle = open_bundle(export_once(run.variant, "fp32", patch_nums, run.ema))
    backend = OnnxRuntimeBackend(bundle, "cpu")
    tensors = run.tensors()
    found: dict[str, np.ndarray] = {}
    drawing = draw(
        backend,
        bundle.manifest,
        tensors["ctx.features"].astype(np.float32),
        tensors["ctx.mask"].astype(np.bool_),
        run.noise(),
        run.settings(),
        record=lambda name, value: found.__setitem__(name, backend.to_host(value).copy()),
    )
    found["image"] = drawing.images
    assert {f"scale{k}.idx" for k in range(len(run.patch_nums))} <= set(found)
    compare(run, found, FACTOR, partial=True)
