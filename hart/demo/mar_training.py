"""The training of the demo's MAR: a small KL tokenizer, and a model of the width of the other two over it.

It sees the scenes that HART and VAR of the demo of classes see, in the same order, as often.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from hart_runtime.common.checkpoint import CLASS_NAMES, SAMPLING_FILE
from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.common.settings import MAR_PUBLISHED
from hart_runtime.hart.demo.class_training import DATASET, HART, STAGE, class_scenes, shapes_tokenizer
from hart_runtime.hart.demo.draw import SIZE
from hart_runtime.hart.demo.encoding import BATCH, pixels
from hart_runtime.hart.demo.optimise import Stage, initialise, optimise
from hart_runtime.hart.demo.scenes import CLASSES, Scene, all_scenes
from hart_runtime.hart.kl_tokenizer import KlTokenizer, patchify
from hart_runtime.hart.mar import MarTransformer
from hart_runtime.hart.mar_files import TOKENIZER_NAME, TRANSFORMER_NAME
from hart_runtime.hart.mar_losses import kl_tokenizer_loss, masked_loss
from hart_runtime.hart.random_mar import SETS

KL = KlConfig(ch=32, ch_mult=(1, 1, 2, 2), z_channels=16)
MAR = MarConfig(
    num_classes=HART.num_classes,
    side=SIZE // KL.downsample,
    patch=1,
    token_channels=KL.z_channels,
    buffer=8,
    encoder_dim=HART.embed_dim,
    encoder_depth=HART.depth // 2,
    encoder_heads=HART.num_heads,
    encoder_hidden=HART.mlp_hidden,
    decoder_dim=HART.embed_dim,
    decoder_depth=HART.depth // 2,
    decoder_heads=HART.num_heads,
    decoder_hidden=HART.mlp_hidden,
    diff_width=HART.diff_width,
    diff_depth=HART.diff_depth,
)
"""As many blocks as the others have, half of them in the encoder."""
KL_STAGE = Stage("classes-kl", steps=1500, batch=8, learning_rate=7e-4)
KL_WEIGHT = 1e-5
REPEATS = 1
"""The others see a token with one noise, too, and a step takes about as long."""
MAR_STAGE = replace(STAGE, name="classes-mar")
SAMPLING = replace(MAR_PUBLISHED, guidance=2.0)


def train_kl_tokenizer(
    work: Path, seed: int, device: torch.device, stage: Stage = KL_STAGE, config: KlConfig = KL
) -> KlTokenizer:
    """Learn to bring pictures back, from the convolutions of the text demo's tokenizer on."""
    torch.manual_seed(seed)
    model = KlTokenizer(config).to(device)
    begin_with(model, shapes_tokenizer())
    scenes = all_scenes()

    def draw(rng: np.random.Generator, count: int) -> Tensor:
        return pixels([scenes[i] for i in rng.integers(len(scenes), size=count)], rng).to(device)

    def batch_loss(step: int) -> dict[str, Tensor]:
        images = draw(np.random.default_rng([seed, 60, step]), stage.batch)
        return kl_tokenizer_loss(model, images, KL_WEIGHT, torch.Generator().manual_seed(step))

    averaged = optimise(model, stage, batch_loss, work)
    model.load_state_dict(averaged.state_dict())
    scale_latents(model, draw(np.random.default_rng([seed, 61]), 256))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def begin_with(model: KlTokenizer, other: nn.Module) -> int:
    """Take the weights that another autoencoder has by the same names in the same shapes; how many."""
    theirs = dict(other.named_parameters())
    taken = 0
    for name, own in model.named_parameters():
        if name in theirs and theirs[name].shape == own.shape:
            own.copy_(theirs[name])
            taken += 1
    return taken


@torch.no_grad()
def scale_latents(model: KlTokenizer, images: Tensor) -> None:
    """Make tokens of unit variance: latents of the spread that the published code divides by."""
    mean, log_variance = model.encode(images)
    spread = (mean.var() + log_variance.exp().mean()).sqrt()
    factor = float(1 / (model.config.latent_scale * spread))
    channels = model.config.z_channels
    for weight in (model.quant_conv.weight, model.quant_conv.bias):
        assert weight is not None
        weight[:channels] *= factor
    assert model.quant_conv.bias is not None
    model.quant_conv.bias[channels:] += 2 * float(np.log(factor))
    model.post_quant_conv.weight /= factor


@torch.no_grad()
def encoded_tokens(
    tokenizer: KlTokenizer, scenes: list[Scene], rng: np.random.Generator, file: Path, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Means and spreads of tokens, (N, L, D) float16 each, drawn and encoded unless a file holds them."""
    if not file.is_file():
        parts = []
        scale = tokenizer.config.latent_scale
        with Progress() as progress:
            for start in progress.track(range(0, len(scenes), BATCH), description="encoding"):
                mean, log_variance = tokenizer.encode(pixels(scenes[start : start + BATCH], rng).to(device))
                both = mean, torch.exp(log_variance / 2)
                parts.append([(scale * patchify(value, MAR.patch)).half().cpu() for value in both])
        means, spreads = (torch.cat(values) for values in zip(*parts, strict=True))
        torch.save({"means": means, "spreads": spreads}, file)
    found = torch.load(file, weights_only=True, map_location=device)
    return found["means"], found["spreads"]


def train_mar(
    tokenizer: KlTokenizer, work: Path, seed: int, device: torch.device, stage: Stage = MAR_STAGE
) -> MarTransformer:
    """Learn to draw classes; every picture's latent is sampled anew each time it is seen."""
    torch.manual_seed(seed)
    scenes, rng = class_scenes(seed)
    file = work / "encoded-classes-kl.pt"
    means, spreads = encoded_tokens(tokenizer.to(device), scenes, rng, file, device)
    labels = torch.tensor([scene.label for scene in scenes], device=device)
    model = MarTransformer(MAR).to(device)
    initialise(model, MAR.encoder_depth + MAR.decoder_depth)
    for name, places in model.named_parameters():
        if "pos_embed" in name or name in ("fake_latent", "mask_token"):
            nn.init.normal_(places, std=0.3)

    def batch_loss(step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng([seed, 51, step]).choice(DATASET, size=stage.batch)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(means[chosen].shape, generator=generator).to(device)
        tokens = means[chosen].float() + spreads[chosen].float() * noise
        return masked_loss(model, labels[chosen], tokens, generator, REPEATS)

    averaged = optimise(model, stage, batch_loss, work)
    model.load_state_dict(averaged.state_dict())
    return model.eval().requires_grad_(False)


def save_mar(transformer: MarTransformer, tokenizer: KlTokenizer, output: Path) -> None:
    """Write both files in the published layout, in float16, with the averaged weights alone."""
    output.mkdir(parents=True, exist_ok=True)
    for model, name, key in ((transformer, TRANSFORMER_NAME, SETS[1]), (tokenizer, TOKENIZER_NAME, SETS[0])):
        state = {part: value.half().clone() for part, value in model.cpu().state_dict().items()}
        torch.save({key: state}, output / name)
    own = json.dumps(asdict(SAMPLING), indent=2)
    (output / SAMPLING_FILE).write_text(f"{own}\n", encoding="utf-8")
    (output / CLASS_NAMES).write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
