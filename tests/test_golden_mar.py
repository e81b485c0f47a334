"""The reference model against the published MAR code, tensor by tensor."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from hart_runtime.hart.mar_checkpoint import load_mar
from hart_runtime.hart.mar_generate import generate_tokens
from hart_runtime.hart.model import Mar
from tests.golden_mar import MarRun, close, heads_of, mar_runs, mar_variants, recording_all


@cache
def load(variant: Path, ema: bool) -> Mar:
    return load_mar(variant / "checkpoint-last.pth", variant / "kl16.ckpt", heads=heads_of(variant), ema=ema)


@pytest.mark.parametrize("run", mar_runs(), ids=lambda run: run.label)
def test_replay(run: MarRun) -> None:
    """Every recorded tensor of every run; masks, lengths and timesteps exactly."""
    model, told = load(run.variant, run.ema), run.parameters
    config = model.transformer.config
    steps = run.steps(config.tokens)
    unknown = [config.tokens - step.known for step in steps]
    assert [*unknown[1:], 1] == told["mask_len"]
    assert [step.predicted for step in steps] == told["n_pred"]
    np.testing.assert_allclose([step.guidance for step in steps], told["cfg_iter"], rtol=1e-7)  # of float32
    assert run.schedule.timesteps[::-1].tolist() == told["timesteps"]

    found: dict[str, NDArray[Any]] = {}
    labels = torch.from_numpy(run.labels(config.num_classes))
    with recording_all(model, found) as record:
        generate_tokens(model, labels, run.noise(), steps, run.schedule, run.temperature, record)
    assert run.compare(found) >= 3 * len(steps) + 3


@pytest.mark.parametrize("variant", mar_variants(), ids=lambda v: v.name)
def test_tokenizer(variant: Path) -> None:
    file = variant / "golden" / "vae.safetensors"
    if not file.is_file():
        pytest.skip("this variant records no tokenizer")
    expected = load_file(file)
    tokenizer = load(variant, True).tokenizer
    with torch.inference_mode():
        mean, log_variance = tokenizer.encode(expected["image_in"])
        found = {
            "encoder_out": tokenizer.encoder(expected["image_in"]),
            "mean": mean,
            "logvar": log_variance,
            "sample": mean + torch.exp(log_variance / 2) * expected["noise"].float(),
            "decoded": tokenizer.decode(mean),
        }
    assert found.keys() == expected.keys() - {"image_in", "noise"}
    for name, value in found.items():
        close(name, "image" if name == "decoded" else name, value.numpy(), expected[name].numpy())


@pytest.mark.skipif("HART_GOLDEN_DIR" not in os.environ, reason="recordings of MAR are not in the repository")
def test_both_sets_of_weights_are_told_apart() -> None:
    """The public recordings' other set is no average: a replay with it must be seen."""
    for variant in mar_variants():
        averaged, plain = (load(variant, ema).transformer.z_proj.weight for ema in (True, False))
        if not torch.equal(averaged, plain):
            run = next(run for run in mar_runs() if run.variant == variant)
            model = load(variant, not run.ema)
            found: dict[str, NDArray[Any]] = {}
            labels = torch.from_numpy(run.labels(model.transformer.config.num_classes))
            with recording_all(model, found) as record:
                steps = run.steps(model.transformer.config.tokens)
                generate_tokens(model, labels, run.noise(), steps, run.schedule, run.temperature, record)
            with pytest.raises(AssertionError, match="off by"):
                run.compare(found)
            assert np.isfinite(found["image"]).all()
