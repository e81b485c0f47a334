"""The reference of MAR on small random weights: what its definition says, whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.masking import token_steps
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import CONSTANT, LINEAR, SamplingSettings
from hart_runtime.export.calibration import calibrate, convolutions
from hart_runtime.hart.autoencoder import AttnBlock, SplitAttnBlock
from hart_runtime.hart.diffusion import TokenDiffusion, denoise, guide, guide_tokens
from hart_runtime.hart.kl_tokenizer import KlTokenizer, patchify, pixels, unpatchify
from hart_runtime.hart.mar import MarTransformer, at_places
from hart_runtime.hart.mar_generate import generate_tokens
from hart_runtime.hart.model import Mar
from hart_runtime.hart.random_weights import random_weight
from hart_runtime.hart.transformer import scaled_dot_product
from tests.golden_mar import recording_all
from tests.mar_models import SMALL, VARIANTS, MarShape

SEEDS = [3, 4]


@cache
def model_of(shape: MarShape = SMALL) -> Mar:
    generator = torch.Generator().manual_seed(5)
    model = Mar(MarTransformer(shape.transformer).eval(), KlTokenizer(shape.tokenizer).eval())
    for part in model:
        for name, weight in part.named_parameters():
            weight.data = random_weight(name, tuple(weight.shape), generator)
    return model


def drawn(
    model: Mar,
    labels: list[int],
    seeds: list[int],
    iterations: int = 5,
    guidance: float = 2.5,
    schedule: str = LINEAR,
    steps: str = "ddim10",
    temperature: float = 1.0,
) -> dict[str, NDArray[Any]]:
    """What the loop tells; by default without the noisiest step, which makes huge tokens of random eps."""
    found: dict[str, NDArray[Any]] = {}
    plan = token_steps(model.transformer.config.tokens, iterations, guidance, schedule)
    with recording_all(model, found) as record:
        given = torch.tensor(labels), SeededNoise(seeds), plan, diffusion_schedule(steps)
        found["returned"] = generate_tokens(model, *given, temperature, record).numpy()
    return found


def near(one: NDArray[Any], other: NDArray[Any], tolerance: float = 1e-4) -> bool:
    scale = max(1.0, float(np.abs(other).max()))
    return bool(np.abs(one.astype(float) - other.astype(float)).max() / scale < tolerance)


@pytest.mark.parametrize("shape", [SMALL, *VARIANTS.values()], ids=["small", *VARIANTS])
def test_every_form_draws(shape: MarShape) -> None:
    model, config = model_of(shape), shape.transformer
    found = drawn(model, [1, 2], SEEDS, iterations=min(3, config.tokens))
    side = config.latent_side * shape.tokenizer.downsample
    assert found["image"].shape == (2, 3, side, side)
    assert found["latent"].shape == (2, config.latent_channels, config.latent_side, config.latent_side)
    bytes_of = (
        (255 * found["returned"]).astype(np.uint8).transpose(0, 2, 3, 1)
    )  # what writers of pictures cut
    assert np.array_equal(bytes_of, found["png"])
    assert np.isfinite(found["image"]).all()
    assert not near(found["image"][0], found["image"][1])


@pytest.mark.parametrize("iterations", [1, 2, 5, 16])
def test_tokens_are_written_once(iterations: int) -> None:
    found = drawn(model_of(), [1, 2], SEEDS, iterations)
    before = np.zeros_like(found["step0.tokens"])
    for step in range(iterations):
        mask, predicted, after = (found[f"step{step}.{what}"] for what in ("mask", "pred", "tokens"))
        assert not (predicted & ~mask).any()
        assert np.array_equal(after[~predicted], before[~predicted])
        assert np.array_equal(after[predicted], found[f"step{step}.sampled"])
        assert (after[mask & ~predicted] == 0).all()
        before = after
    assert not (mask & ~predicted).any()
    last = torch.from_numpy(before)
    assert np.array_equal(found["latent"], unpatchify(last, 1).numpy())


def test_a_picture_does_not_depend_on_its_batch() -> None:
    both, alone = (drawn(model_of(), labels, seeds) for labels, seeds in (([1, 2], SEEDS), ([2], SEEDS[1:])))
    assert near(both["latent"][1:], alone["latent"])
    assert not near(both["latent"][:1], alone["latent"])


def test_of_no_class_guidance_has_no_effect() -> None:
    """Both halves say the same, so that u + g * (c - u) is c, but for the rounding of rows apart."""
    nothing = SMALL.transformer.num_classes
    one, other = (drawn(model_of(), [nothing] * 2, SEEDS, guidance=g) for g in (2.0, 7.0))
    assert near(one["image"], other["image"])
    unguided = drawn(model_of(), [nothing] * 2, SEEDS, guidance=1)
    assert near(unguided["latent"], one["latent"])
    assert unguided["step1.z"].shape[0] * 2 == one["step1.z"].shape[0]


def test_settings_matter() -> None:
    usual = drawn(model_of(), [1, 2], SEEDS)
    for changed in (
        {"guidance": 1.0},
        {"schedule": CONSTANT},
        {"temperature": 0.5},
        {"steps": "ddim20"},
        {"steps": "10"},
        {"steps": "3,3,4"},
        {"iterations": 6},
    ):
        assert not near(drawn(model_of(), [1, 2], SEEDS, **changed)["latent"], usual["latent"]), changed  # type: ignore[arg-type]
    assert not near(drawn(model_of(), [1, 3], SEEDS)["latent"], usual["latent"])


def test_the_temperature_is_of_the_steps_alone() -> None:
    """At 0 what denoising begins with still decides."""
    one, other = (drawn(model_of(), [1], [seed], temperature=0.0, iterations=1) for seed in (1, 2))
    assert not near(one["step0.sampled"], other["step0.sampled"])
    assert np.array_equal(one["step0.diff.x_t"][0], one["step0.diff.init_noise"])


@torch.inference_mode()
def test_only_known_tokens_are_seen() -> None:
    model, config = model_of().transformer, SMALL.transformer
    places = torch.tensor([[1, 5, 6], [0, 2, 15]])
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    condition = model.condition(torch.tensor([1, 2]), guided=False)
    encoded = model.encode(tokens, places, condition)
    assert encoded.shape == (2, config.buffer + 3, config.encoder_dim)
    z = model.decode(encoded, places)
    assert z.shape == (2, config.tokens, config.decoder_dim)
    turned = torch.tensor([2, 0, 1])
    other = model.decode(
        model.encode(tokens[:, turned], places[:, turned], condition), places[:, turned]
    )  # the places decide, and not the order
    assert near(other.numpy(), z.numpy())
    chosen = at_places(z, torch.tensor([[3, 4], [1, 14]]))
    assert torch.equal(chosen[1, 1], z[1, 14])


@torch.inference_mode()
def test_nothing_known_is_a_constant_of_the_class() -> None:
    model, config = model_of().transformer, SMALL.transformer
    condition = model.condition(torch.tensor([1, 1, config.num_classes]), guided=True)
    assert torch.equal(condition[2], model.fake_latent[0])
    assert (condition[3:] == model.fake_latent).all()
    nothing = torch.zeros(6, 0, dtype=torch.int64)
    z = model.decode(model.encode(torch.zeros(6, 0, 4), nothing, condition), nothing)
    assert near(z[0].numpy(), z[1].numpy())
    assert near(z[2].numpy(), z[5].numpy())
    assert not near(z[0].numpy(), z[2].numpy())


def test_patches_are_laid_out_as_published() -> None:
    """Channel (c * p + row) * p + column of a token is cell (row, column) of channel c."""
    tokens = torch.arange(2 * 4 * 12).reshape(2, 4, 12).float()
    latent = unpatchify(tokens, 2)
    assert latent.shape == (2, 3, 4, 4)
    for c, row, column in np.ndindex(3, 2, 2):
        assert latent[1, c, 2 + row, column] == tokens[1, 2, (c * 2 + row) * 2 + column]
    assert torch.equal(patchify(latent, 2), tokens)


def test_bytes_are_rounded() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, 200.6 / 127.5 - 1, 200.4 / 127.5 - 1])
    images = values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert pixels(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 201, 200]


def test_guidance_of_both_families_is_the_same_line() -> None:
    """HART counts from 0 what MAR counts from 1."""
    one, other = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(guide(one, other, 1.5), guide_tokens(one, other, 2.5), atol=1e-6)
    assert torch.equal(guide_tokens(one, other, 2.5)[:, 4:], one[:, 4:])


def test_only_hart_bounds_its_estimate() -> None:
    schedule = diffusion_schedule("10")
    x, output, noise = torch.full((1, 2), 3.0), torch.zeros(1, 4), torch.zeros(1, 2)
    coefficients = torch.from_numpy(schedule.coefficients(9))
    assert denoise(x, output, coefficients, noise)["pred_xstart"].tolist() == [[1.0, 1.0]]
    assert float(denoise(x, output, coefficients, noise, bound=None)["pred_xstart"][0, 0]) > 1000


@torch.inference_mode()
def test_attention_with_split_weights_is_the_same() -> None:
    torch.manual_seed(0)
    one, split = AttnBlock(32), SplitAttnBlock(32)
    assert one.qkv.bias is not None
    for part, weight, bias in zip("qkv", one.qkv.weight.chunk(3), one.qkv.bias.chunk(3), strict=True):
        getattr(split, part).load_state_dict({"weight": weight, "bias": bias})
    split.proj_out.load_state_dict(one.proj_out.state_dict())
    x = torch.randn(2, 32, 5, 5)
    assert torch.allclose(one(x), split(x), atol=1e-6)
    assert "qkv.weight" not in split.state_dict()


@torch.inference_mode()
def test_the_tokenizer_goes_there_and_back_in_size() -> None:
    tokenizer = model_of().tokenizer
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    mean, log_variance = tokenizer.encode(images)
    assert mean.shape == log_variance.shape == (2, 4, 8, 6)
    assert float(log_variance.min()) >= -30
    assert float(log_variance.max()) <= 20
    assert tokenizer.decode(mean).shape == images.shape
    tokens = torch.randn(1, 16, 4)
    scaled = KlTokenizer(replace(SMALL.tokenizer, latent_scale=1.0))
    scaled.load_state_dict(tokenizer.state_dict())
    assert torch.allclose(
        tokenizer.decode_tokens(tokens, 1), scaled.decode_tokens(tokens / 0.2325, 1), atol=1e-4
    )


def test_the_head_learns_what_it_is_told() -> None:
    """Targets are not bounded; its loss falls on tokens that the condition decides."""
    torch.manual_seed(0)
    head, generator = TokenDiffusion(4, 8, 32, 1), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(head.parameters(), 2e-3)
    z = torch.randn(256, 8)
    target: Tensor = 3 * z[:, :4]
    losses = []
    for _ in range(150):
        loss = head.loss(z, target, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])


def test_what_the_decoder_sees_is_measured() -> None:
    """For 8 bits, of tokens that are drawn in a few steps and of random ones."""
    model = model_of()
    seen = calibrate(model, SamplingSettings(steps="100"), SMALL.transformer.patch_nums)
    assert seen.keys() == {name for name, _ in convolutions(model.tokenizer.decoder)}
    assert all(one.made.low < one.made.high for one in seen.values())


@torch.inference_mode()
def test_some_places_alone_are_the_same() -> None:
    """What graphs compute in the last block, of the places that are asked for."""
    model = model_of().transformer
    places, wanted = torch.tensor([[1, 5, 6]]), torch.tensor([[0, 3, 15]])
    tokens = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    encoded = model.encode(tokens, places, model.condition(torch.tensor([1]), guided=False))
    whole = at_places(model.decode(encoded, places), wanted)
    assert near(model.decode_at(encoded, places, wanted, scaled_dot_product).numpy(), whole.numpy(), 1e-5)
