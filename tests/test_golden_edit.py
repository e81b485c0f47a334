"""Editing against VAR's published notebook: which codes are kept, which are drawn, and the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hart_runtime.common.editing import kept_inside
from hart_runtime.hart.editing import kept_of
from hart_runtime.hart.generate import generate_classes
from tests.golden_hooks import recording_all
from tests.golden_runs import EditRun, compare, edit_runs
from tests.test_golden_var import load


def test_the_public_runs_are_found() -> None:
    assert {run.label for run in edit_runs()} >= {"var_plain-edit_inpaint", "var_plain-edit_class_outpaint"}


@pytest.mark.parametrize("run", edit_runs(), ids=lambda run: run.label)
def test_replay(run: EditRun) -> None:
    tensors, found = run.tensors(), {}
    model = load(run.variant)
    cells = kept_inside(run.cells, run.patch_nums)
    images = torch.from_numpy(tensors["image_in"])
    kept = kept_of(model.tokenizer, images, cells, run.patch_nums)
    labels = torch.from_numpy(tensors["label"])
    with recording_all(model, found) as record:
        generate_classes(model, labels, run.noise(), run.settings(), record, kept)
    with torch.inference_mode():
        given = model.tokenizer.encode(images).indices
    for k, (index, inside) in enumerate(zip(given, cells, strict=True)):
        found[f"scale{k}.gt_idx"], found[f"scale{k}.force"] = index.numpy(), inside
        drawn = found[f"scale{k}.idx"]
        found[f"scale{k}.idx_used"] = np.where(inside.reshape(drawn.shape), index.numpy(), drawn)
    compare(run, found)
    force = [name for name in run.expected() if name.endswith(".force")]
    assert all(np.array_equal(found[name], run.expected()[name]) for name in force)
