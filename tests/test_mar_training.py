"""The demo's MAR can be trained, saved and read again; that it draws well is for its report to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hart_runtime.common.mar_config import KlConfig
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart import checkpoints
from hart_runtime.hart.demo import class_training, mar_training
from hart_runtime.hart.demo.class_training import shapes_tokenizer
from hart_runtime.hart.demo.judging import draw_labels
from hart_runtime.hart.demo.mar_training import (
    KL,
    KL_STAGE,
    MAR,
    MAR_STAGE,
    begin_with,
    save_mar,
    scale_latents,
    train_kl_tokenizer,
    train_mar,
)
from hart_runtime.hart.find import find
from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.mar import MarTransformer
from hart_runtime.hart.mar_losses import kl_tokenizer_loss, masked_loss
from hart_runtime.hart.model import Mar
from tests.test_mar import model_of

CPU = torch.device("cpu")


def test_a_short_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From scenes to pictures of the reference, through both files."""
    small = KlConfig(ch=32, ch_mult=(1, 1, 1, 1), z_channels=KL.z_channels)
    for module in (class_training, mar_training):
        monkeypatch.setattr(module, "DATASET", 64)
    tokenizer = train_kl_tokenizer(tmp_path, 0, CPU, replace(KL_STAGE, steps=2, batch=2), small)
    transformer = train_mar(tokenizer, tmp_path, 0, CPU, replace(MAR_STAGE, steps=2, batch=4))
    save_mar(transformer, tokenizer, tmp_path / "mar")
    found = find(tmp_path / "mar", heads="4")
    assert found.llm_config == MAR
    assert found.tokenizer_config == small
    assert found.class_names is not None
    assert found.sampling.guidance == 2.0
    model = checkpoints.load(found)
    assert isinstance(model, Mar)
    few = replace(found.sampling, iterations=2, steps="ddim4")
    pictures = draw_labels(model, [0, 44], 0, few)
    assert pictures.shape == (2, 64, 64, 3)
    assert np.isfinite(pictures).all()
    assert isinstance(few, SamplingSettings)


@torch.inference_mode()
def test_tokens_have_unit_variance() -> None:
    """And pictures are brought back as before."""
    torch.manual_seed(0)
    model = KlTokenizer(replace(KL, ch_mult=(1, 1)))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    mean, log_variance = model.encode(images)
    before = model.decode(mean)
    scale_latents(model, images)
    scaled, scaled_variance = model.encode(images)
    spread = (scaled.var() + scaled_variance.exp().mean()).sqrt() * KL.latent_scale
    assert float(spread) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(model.decode(scaled), before, atol=1e-4)
    ratio = scaled.std() / mean.std()
    assert torch.allclose(scaled_variance - log_variance, 2 * ratio.log(), atol=1e-3)


def test_the_tokenizer_begins_with_the_text_demos() -> None:
    model, other = KlTokenizer(KL), shapes_tokenizer()
    taken = begin_with(model, other)
    assert 200 < taken < len(list(model.parameters()))
    assert torch.equal(model.encoder.conv_in.weight, other.encoder.conv_in.weight)
    assert torch.equal(model.decoder.conv_out.weight, other.decoder.conv_out.weight)


def test_losses_teach() -> None:
    """Every weight that drawing uses gets a gradient, and a few steps lower both."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(8, 16, 4, generator=generator), torch.arange(8) % 7
    images = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    model = model_of()
    transformer = MarTransformer(model.transformer.config)
    transformer.load_state_dict(model.transformer.state_dict())
    tokenizer = KlTokenizer(model.tokenizer.config)
    for network, losses in (
        (transformer, lambda step: masked_loss(transformer, labels, tokens, step)),
        (tokenizer, lambda step: kl_tokenizer_loss(tokenizer, images, 1e-4, step)),
    ):
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        seen: list[float] = []
        for step in range(30):
            loss = torch.stack(list(losses(torch.Generator().manual_seed(step)).values())).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if not seen:
                assert {name for name, p in network.named_parameters() if p.grad is None} == set()
            optimizer.step()
            seen.append(float(loss.detach()))
        assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:5])
