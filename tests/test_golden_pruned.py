"""Token pruning against FastVAR's published code: which tokens, what they leave behind, every index."""

from __future__ import annotations

import pytest
import torch

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.generate import generate
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from tests.conftest import ExportOnce
from tests.golden_runs import PrunedRun, compare, drawn_by_graphs, pruned_runs


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
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("run", pruned_runs(), ids=lambda run: run.label)
def test_graphs(run: PrunedRun, export_once: ExportOnce) -> None:
    """The whole pyramid takes minutes."""
    bundle = open_bundle(export_once(run.variant, "fp32", None, False))
    found = drawn_by_graphs(run, on_the_cpu(bundle), bundle.manifest)
    compare(run, found, partial=True)
