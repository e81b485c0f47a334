"""HART of a class: graphs against the reference, and what only this combination can get wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.config import HYBRID, ClassHartConfig, TokenizerConfig
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.recorded import recording
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.checkpoint import load_hybrid
from hart_runtime.hart.generate import generate_classes
from hart_runtime.hart.model import ClassHart
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.loop import draw, drawn
from tests.test_variants import write_random_checkpoint

SHAPE = (
    ClassHartConfig(
        depth=2,
        embed_dim=48,
        num_heads=3,
        num_classes=5,
        patch_nums=(1, 3, 3),
        mlp_hidden=96,
        attn_l2_norm=False,
        shared_aln=False,
        diff_width=24,
        diff_depth=2,
        num_sampling_steps="2,1",
    ),
    TokenizerConfig(
        vocab_size=64,
        ch=32,
        ch_mult=(1, 1),
        share_quant_resi=0,
        v_patch_nums=(1, 3, 3),
        quantizer_type=HYBRID,
    ),
)
"""In all that checkpoints can differ in, another than the demo's."""

AMPLIFIED = (".sample", ".x_t", "final.f_hat")
"""The noisiest denoising step multiplies rounding by 2e4 and clamps most of what comes of it; what is left
goes on to the picture. hart-compare looks at each step by itself. Smooth sampling divides by a small
temperature, as in the recorded runs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of this shape."""
    folder = tmp_path_factory.mktemp("class-hart") / "model"
    write_random_checkpoint(folder, *SHAPE)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    """Exported in float32."""
    export_bundle(Request(find_checkpoint(model), "fp32"), model.parent / "bundle")
    return model.parent / "bundle"


@pytest.mark.parametrize("smooth", [False, True])
def test_graphs_follow_the_reference(bundle: Path, model: Path, smooth: bool) -> None:
    """Every tensor of a random model's drawing, and the codes are the same."""
    follow(bundle, model, SamplingSettings(guidance=2.0, top_k=25, top_p=0.9, smooth=smooth, steps="3"))


def follow(folder: Path, checkpoint: Path, settings: SamplingSettings) -> None:
    bundle, model = open_bundle(folder), load_hybrid(find_checkpoint(checkpoint))
    assert isinstance(model, ClassHart)
    labels = np.array([1, model.transformer.config.num_classes], np.int64)  # the second is none
    expected: dict[str, np.ndarray] = {}
    generate_classes(
        model,
        torch.from_numpy(labels),
        SeededNoise([1, 2]),
        settings,
        record=lambda key, value: expected.__setitem__(key, value.numpy().copy()),
    )
    recorder, found = recording(on_the_cpu(bundle), bundle.manifest)
    program = bundle.manifest.program(settings, 2)
    drawing = drawn(draw(recorder, program, {"label": labels}, SeededNoise([1, 2])))
    assert {"final.diff.embedded", "final.diff.step2.sample", "modulations", "scale2.idx"} <= found.keys()
    for key in found.keys() & expected.keys() - {"image"}:  # which graphs decode one by one
        wanted = expected[key].reshape(found[key].shape)
        limit = 1e-2 if settings.smooth else 1e-3
        if np.issubdtype(wanted.dtype, np.integer):
            limit = 0
        elif key.endswith(AMPLIFIED):
            limit = 2e-2
        np.testing.assert_allclose(found[key], wanted, rtol=1e-5, atol=limit, err_msg=key)
    np.testing.assert_allclose(drawing.images, expected["image"], rtol=0, atol=1e-2)
