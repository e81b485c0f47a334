"""The reference model against the published code, tensor by tensor."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.hart.checkpoint import load_hart
from hart_runtime.hart.generate import generate
from hart_runtime.hart.model import Hart
from tests.golden_hooks import recording_all
from tests.golden_runs import ABSOLUTE, HERE, IMAGE, Run, compare, runs, variants


@cache
def load(variant: Path, ema: bool | None = None) -> Hart:
    return load_hart(find_checkpoint(variant, ema=ema))


def test_the_public_runs_are_found() -> None:
    labels = {run.label for run in runs()}
    assert {"t2i_main-nine_scales", "t2i_main-cfg4over3_quirk", "t2i_adaln-cfg4.5_smooth"} <= labels
    assert len(labels) >= 12


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.label)
def test_replay(run: Run) -> None:
    """Every recorded tensor of every run, indices exactly."""
    model = load(run.variant, run.ema)
    tensors = run.tensors()
    found: dict[str, np.ndarray] = {}
    with recording_all(model, found) as record:
        generate(
            model,
            torch.from_numpy(tensors["ctx.features"]),
            torch.from_numpy(tensors["ctx.mask"]),
            run.noise(),
            run.settings(),
            run.patch_nums,
            record,
        )
    compare(run, found)


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_tokenizer(variant: Path) -> None:
    """Encoder, quantizer in both rules, and both decoding paths."""
    file = variant / "golden" / "tokenizer.safetensors"
    if not file.is_file():
        assert variant.parent.resolve() != HERE.resolve()
        pytest.skip("this variant records no tokenizer")
    expected = load_torch(file)
    tokenizer = load(variant).tokenizer
    patch_nums, quantizer = tokenizer.config.v_patch_nums, tokenizer.quantize
    images = expected["image_in"]
    with torch.inference_mode():
        f = tokenizer.latent(images)
        tokens = tokenizer.encode(images)
        f_hats = quantizer.accumulate(tokens.indices, patch_nums)
        phi_all = quantizer.accumulate(tokens.indices, patch_nums, phi_on_last=True)
        continuous = f_hats[-2] + tokens.rest
        found = {
            "encoder_out": tokenizer.encoder(images),
            "f": f,
            "f_rest": tokens.rest.flatten(2).transpose(1, 2),
            "f_hat_continuous": continuous,
            "var_input": quantizer.transformer_inputs(f_hats, patch_nums),
            "image_discrete": tokenizer.decode_discrete(tokens),
            "image_continuous": tokenizer.decode_continuous(tokens),
            "image_discrete_phi_all": tokenizer.decode(phi_all[-1]),
            "forward_out": tokenizer.decode_unclamped(continuous),
            "forward_out_skip": tokenizer.decode_unclamped(phi_all[-1]),
        }
        for k, index in enumerate(tokens.indices):
            found[f"scale{k}.idx"] = index
            found[f"scale{k}.f_hat"] = f_hats[k]
            found[f"scale{k}.f_hat_phi_all"] = phi_all[k]
            following = patch_nums[min(k + 1, len(patch_nums) - 1)]
            shrunk = torch.nn.functional.adaptive_avg_pool2d(f_hats[k], following)
            found[f"scale{k}.next_map"] = shrunk
    for name in expected.keys() - {"image_in"}:
        result, value = found[name].reshape(expected[name].shape), expected[name]
        if value.dtype == torch.int64:
            assert torch.equal(result, value), name
        else:
            limit = IMAGE if "image" in name or "forward" in name else ABSOLUTE
            assert (result - value).abs().max() <= limit, name


@pytest.mark.parametrize(
    ("prefix", "respacing"),
    [
        ("steps8", "8"),
        ("steps1000", ""),
        ("steps4", "4"),
        ("steps25", "25"),
        ("steps100", "100"),
        ("ddim50", "ddim50"),
        ("sections10_15_20", "10,15,20"),
    ],
)
def test_diffusion_schedule(prefix: str, respacing: str) -> None:
    arrays = load_file(HERE / "schedule" / "diffusion_schedule.safetensors")
    schedule = diffusion_schedule(respacing)
    assert np.array_equal(schedule.timesteps, arrays[f"{prefix}.timestep_map"])
    for name in (
        "alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_log_variance_clipped",
        "log_betas",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    ):
        if f"{prefix}.{name}" in arrays:
            np.testing.assert_allclose(getattr(schedule, name), arrays[f"{prefix}.{name}"], rtol=1e-9)
