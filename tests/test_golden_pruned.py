"""Token pruning against FastVAR's published code: which tokens, what they leave behind, every index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.compare.recorded import recording
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.generate import generate
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.loop import draw, drawn
from tests.conftest import ExportOnce
from tests.golden_runs import PrunedRun, compare, pruned_runs


@pytest.mark.parametrize("run", pruned_runs(), ids=lambda run: run.label)
def test_replay(run: PrunedRun) -> None:
    tensors, found = run.tensors(), {}
    generate(
        load_hart(find_checkpoint(run.variant, ema=False)),
        torch.from_numpy(tensors["ctx.features"]),
        torch.from_numpy(tensors["ctx.mask"]),
        run.noise(),
        run.settings(),
        run.patch_nums,
        lambda name, value: found.update({name: value.numpy().copy()}),
    )
    run.check(found)


@pytest.mark.slow
@pytest.mark.parametrize("run", pruned_runs(), ids=lambda run: run.label)
def test_graphs(run: PrunedRun, export_once: ExportOnce) -> None:
    """The whole pyramid takes minutes."""
    bundle = open_bundle(export_once(run.variant, "fp32", None, False))
    recorder, found = recording(on_the_cpu(bundle), bundle.manifest)
    tensors = run.tensors()
    given = {
        "features": tensors["ctx.features"].astype(np.float32),
        "mask": tensors["ctx.mask"].astype(np.bool_),
    }
    program = bundle.manifest.program(run.settings(), len(given["mask"]))
    found["image"] = drawn(draw(recorder, program, given, run.noise())).images
    assert {f"scale{k}.idx" for k in range(len(run.patch_nums))} <= set(found)
    compare(run, found, partial=True)
