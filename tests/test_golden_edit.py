"""Editing against VAR's published notebook: which codes are kept, which are drawn, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hart_runtime.common.editing import kept_inside
from hart_runtime.compare.recorded import recording
from hart_runtime.hart.editing import kept_of
from hart_runtime.hart.generate import generate_classes
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.editing import encode
from hart_runtime.runtime.editing import kept_of as kept_of_pictures
from hart_runtime.runtime.loop import draw, drawn
from tests.conftest import ExportOnce
from tests.golden_hooks import recording_all
from tests.golden_runs import ABSOLUTE, EditRun, class_variants, compare, edit_runs, variants
from tests.test_golden_var import load


def test_the_public_runs_are_found() -> None:
    assert {run.label for run in edit_runs()} >= {"var_plain-edit_inpaint", "var_plain-edit_class_outpaint"}


@pytest.mark.parametrize("run", edit_runs(), ids=lambda run: run.label)
def test_replay(run: EditRun) -> None:
    tensors = run.tensors()
    found: dict[str, np.ndarray] = {}
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


@pytest.mark.parametrize("run", edit_runs(), ids=lambda run: run.label)
def test_graphs(run: EditRun, export_once: ExportOnce) -> None:
    """The exported encoder, and the loop with its codes, with ten times the reference's tolerance."""
    bundle = open_bundle(export_once(run.variant, "fp32"))
    recorder, found = recording(on_the_cpu(bundle), bundle.manifest)
    tensors = run.tensors()
    images = [encode(recorder, run.patch_nums, image[None]) for image in tensors["image_in"]]
    cells = kept_inside(run.cells, run.patch_nums)
    kept = kept_of_pictures(images, [[part[i : i + 1] for part in cells] for i in range(len(images))])
    program = bundle.manifest.program(run.settings(), len(images), edited=True)
    given = {"label": tensors["label"]}
    found["image"] = drawn(draw(recorder, program, given, run.noise(), edit=kept)).images
    for k, index in enumerate(kept.pictures.indices):
        found[f"scale{k}.gt_idx"] = index
        mine = index.reshape(len(index), -1)
        inside = cells[k].reshape(mine.shape)
        found[f"scale{k}.idx_used"] = np.where(inside, mine, found[f"scale{k}.idx"].reshape(mine.shape))
    last = len(run.patch_nums) - 1
    found[f"scale{last}.f_hat"] = found["final.f_hat"]
    assert {f"scale{last}.gt_idx", f"scale{last}.idx", "image"} <= set(found) & set(run.expected())
    compare(run, found, 10.0, partial=True)


@pytest.mark.parametrize("variant", [*variants(), *class_variants()], ids=lambda v: v.name)
def test_the_encoder_of_recorded_tokenizers(variant: Path, export_once: ExportOnce) -> None:
    """Indices are equal, latents within the tolerance of the reference."""
    file = variant / "golden" / "tokenizer.safetensors"
    if not file.is_file():
        pytest.skip("this variant records no tokenizer")
    expected = load_file(file)
    bundle = open_bundle(export_once(variant, "fp32"))
    patch_nums = bundle.manifest.model.patch_nums
    found = encode(on_the_cpu(bundle), patch_nums, expected["image_in"])
    for k, index in enumerate(found.indices):
        assert np.array_equal(index.reshape(len(index), -1), expected[f"scale{k}.idx"]), k
    last = len(patch_nums) - 1
    np.testing.assert_allclose(found.latent, expected["f"], atol=ABSOLUTE, rtol=0)
    np.testing.assert_allclose(found.discrete, expected[f"scale{last}.f_hat"], atol=ABSOLUTE, rtol=0)
    if "f_rest" in expected:
        rest = found.rest.reshape(*found.rest.shape[:2], -1).transpose(0, 2, 1)
        np.testing.assert_allclose(rest, expected["f_rest"], atol=ABSOLUTE, rtol=0)
