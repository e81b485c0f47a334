"""The training of the demo checkpoint, see :mod:`hart_runtime.hart.demo.train`.

Stage 1 learns the image tokenizer, stage 2 the text encoder, the scale transformer and the
residual diffusion together. Every step draws its randomness from (seed, stage, step), so a
run that was interrupted goes on from its last saved state as if nothing had happened.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from hart_runtime.common.config import TextEncoderConfig, TokenizerConfig, TransformerConfig
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.hart.demo.draw import SIZE
from hart_runtime.hart.demo.encoding import encoded, pixels
from hart_runtime.hart.demo.optimise import Stage, TransformerStage, initialise, optimise
from hart_runtime.hart.demo.scenes import Scene, split_scenes
from hart_runtime.hart.demo.vocabulary import train_vocabulary
from hart_runtime.hart.losses import tokenizer_loss, transformer_loss
from hart_runtime.hart.quantizer import shrink
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer

Array = NDArray[np.float64]

PATCH_NUMS = (1, 2, 3, 5, 8)
CONTEXT_TOKENS = 16
TOKENIZER_CONFIG = TokenizerConfig(
    vocab_size=512,
    ch=32,
    ch_mult=(1, 1, 2, 2),
    v_patch_nums=PATCH_NUMS,
    quantizer_type="var_hybrid",
)
TRANSFORMER = TransformerConfig(
    depth=6,
    embed_dim=192,
    num_heads=6,
    mlp_ratio=2.0,
    attn_type="llama",
    mlp_type="llama",
    disable_aln=True,
    use_timestep_embed=True,
    use_context_norm=True,
    context_token=CONTEXT_TOKENS,
    context_dim=128,
    patch_nums=PATCH_NUMS,
    diff_width=256,
    diff_depth=3,
)
RESIDUAL_PERCENTILE, RESIDUAL_REACH = 99.0, 0.45
"""The latent is rescaled so that this share of residuals stays inside the diffusion's range."""
SAMPLING = {"guidance": 1.0, "top_k": 5, "top_p": 0.5, "smooth": False}
"""Chosen with ``python -m hart_runtime.hart.demo.report`` on training scenes."""

SAVE_EVERY = 100


@dataclass(frozen=True)
class TokenizerStage(Stage):
    """Crops first, whole pictures after: convolutions learn most of it at a quarter of the cost."""

    crop: int = SIZE
    patch_nums: tuple[int, ...] = PATCH_NUMS
    discrete_share: float = 0.5
    revive: bool = True
    """Move unused codes to where they are needed, in the first three quarters."""
    quantizer_weight: float = 0.05
    """Low, so that commitment does not talk the encoder out of what only the residual can hold."""


TOKENIZER_STAGES = (
    TokenizerStage(
        "crops",
        steps=2400,
        batch=8,
        learning_rate=7e-4,
        crop=32,
        patch_nums=(1, 2, 3, 4),
        discrete_share=0.0,
    ),
    TokenizerStage("pictures", steps=600, batch=8, learning_rate=5e-4),
    TokenizerStage("restart", steps=900, batch=8, learning_rate=6e-4, horizon=1800, discrete_share=0.3),
    TokenizerStage(
        "texture", steps=1300, batch=8, learning_rate=4e-4, quantizer_weight=0.01, discrete_share=0.25
    ),
)
DECODER_STAGE = TokenizerStage(
    "decoder", steps=1000, batch=8, learning_rate=5e-4, discrete_share=0.1, revive=False
)
TRANSFORMER_STAGES = (
    TransformerStage("transformer", steps=800, horizon=1100, batch=64, learning_rate=1.5e-3),
    TransformerStage("refine", steps=3400, batch=64, learning_rate=1.2e-3, balance=0.5, residual_share=0.25),
    TransformerStage(
        "details",
        steps=900,
        batch=64,
        learning_rate=6e-4,
        balance=0.5,
        residual_share=0.25,
        fine_scenes=2.5,
    ),
)
DATASET = 24576


def train_tokenizer(work: Path, seed: int, device: torch.device) -> ImageTokenizer:
    """Stage 1. Returns the averaged weights, with the latent scaled for the diffusion head."""
    torch.manual_seed(seed)
    model = ImageTokenizer(TOKENIZER_CONFIG).to(device)
    _initialise_tokenizer(model)
    training, _ = split_scenes()

    def draw(rng: np.random.Generator, count: int, crop: int = SIZE) -> Tensor:
        images = pixels([training[i] for i in rng.integers(len(training), size=count)], rng)
        top, left = rng.integers(SIZE - crop + 1, size=2)
        return images[:, :, top : top + crop, left : left + crop].contiguous().to(device)

    def batch_loss(stage: TokenizerStage, number: int, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, number, step])
        if stage.revive and step % 25 == 5 and step < 0.75 * stage.steps:
            _revive_codes(model, draw(rng, 48, stage.crop), stage.patch_nums, rng)
        images = draw(rng, stage.batch, stage.crop)
        generator = torch.Generator().manual_seed(step)
        losses = tokenizer_loss(model, images, stage.patch_nums, stage.discrete_share, generator)
        return {**losses, "quantizer": stage.quantizer_weight * losses["quantizer"]}

    for number, stage in enumerate(TOKENIZER_STAGES):
        averaged = optimise(model, stage, functools.partial(batch_loss, stage, number), work)
        model.load_state_dict(averaged.state_dict())
    _rescale_latent(model, draw(np.random.default_rng([seed, 20]), 256))
    for part in (model.encoder, model.quant_conv, model.quantize):  # the tokens stay as they are
        part.requires_grad_(False)
    averaged = optimise(model, DECODER_STAGE, functools.partial(batch_loss, DECODER_STAGE, 40), work)
    model.load_state_dict(averaged.state_dict())
    return model.eval().requires_grad_(False)


def train_transformer(
    tokenizer: ImageTokenizer, work: Path, seed: int, device: torch.device
) -> tuple[TextEncoder, ScaleTransformer, Tokenizer]:
    """Stage 2: text encoder, transformer and diffusion head, jointly."""
    torch.manual_seed(seed)
    training, _ = split_scenes()
    vocabulary = train_vocabulary(training)
    prompts = PromptTokenizer(copy.deepcopy(vocabulary), CONTEXT_TOKENS)
    text = TextEncoder(_text_config(vocabulary)).to(device)
    transformer = ScaleTransformer(TRANSFORMER, TOKENIZER_CONFIG.vocab_size, TOKENIZER_CONFIG.z_channels).to(
        device
    )
    model = nn.ModuleDict({"text": text, "transformer": transformer})
    initialise(model, TRANSFORMER.depth)
    rng = np.random.default_rng([seed, 30])
    scenes = [training[i] for i in rng.integers(len(training), size=DATASET)]
    data = encoded(tokenizer, scenes, rng, work / "encoded.pt", device)

    def batch_loss(stage: TransformerStage, shares: Array, number: int, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, number, step])
        chosen = rng.choice(DATASET, size=stage.batch, p=shares)
        captions = [scenes[i].caption() if rng.random() < 0.7 else scenes[i].variant(rng) for i in chosen]
        ids, mask = (torch.from_numpy(a).to(device) for a in prompts(captions))
        return transformer_loss(
            transformer,
            tokenizer.quantize,
            text(ids, mask),
            mask,
            *data.batch(chosen),
            torch.Generator().manual_seed(step),
            stage.balance,
            stage.residual_share,
        )

    for number, stage in enumerate(TRANSFORMER_STAGES, start=10):
        shares = _shares(scenes, stage.fine_scenes)
        averaged = optimise(model, stage, functools.partial(batch_loss, stage, shares, number), work)
        model.load_state_dict(averaged.state_dict())
    model.eval().requires_grad_(False)
    return text, transformer, vocabulary


@torch.no_grad()
def _revive_codes(
    model: ImageTokenizer, images: Tensor, patch_nums: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Move codes that none of ``images`` uses onto vectors that the quantizer had to code."""
    quantizer = model.quantize
    f = model.latent(images)
    indices = quantizer.encode(f, patch_nums).indices
    f_hats = [torch.zeros_like(f), *quantizer.accumulate(indices, patch_nums)]
    wanted = torch.cat(
        [
            shrink(f - f_hat, n).permute(0, 2, 3, 1).flatten(0, 2)
            for f_hat, n in zip(f_hats, patch_nums, strict=False)
        ]
    )
    used = torch.cat(indices, dim=1).flatten().bincount(minlength=TOKENIZER_CONFIG.vocab_size)
    dead = (used == 0).nonzero().flatten()
    quantizer.embedding.weight[dead] = wanted[rng.permutation(len(wanted))[: len(dead)]]


@torch.no_grad()
def _rescale_latent(model: ImageTokenizer, images: Tensor) -> None:
    """Scale the latent space; everything around it is linear in it, so pictures do not change."""
    tokens = model.encode(images)
    codes = model.quantize.lookup(tokens.indices[-1], TOKENIZER_CONFIG.v_patch_nums[-1])
    reach = np.percentile((tokens.rest - codes).abs().cpu().numpy(), RESIDUAL_PERCENTILE)
    factor = float(RESIDUAL_REACH / reach)
    model.quant_conv.weight.mul_(factor)
    for bias in (model.quant_conv.bias, *(phi.bias for phi in model.quantize.quant_resi.phis())):
        assert bias is not None
        bias.mul_(factor)
    model.quantize.embedding.weight.mul_(factor)
    model.post_quant_conv.weight.div_(factor)


def _shares(scenes: list[Scene], fine_scenes: float) -> Array:
    """Probability of each scene in a batch."""
    weights = np.array([fine_scenes ** ((s.shape == "star") + (s.size == "small")) for s in scenes])
    return weights / weights.sum()


def _text_config(vocabulary: Tokenizer) -> TextEncoderConfig:
    return TextEncoderConfig(
        vocab_size=vocabulary.get_vocab_size(),
        hidden_size=TRANSFORMER.context_dim,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_llm_system_prompt=False,
    )


def _initialise_tokenizer(model: ImageTokenizer) -> None:
    """Keep the variance along the skip path and start every residual branch at zero.

    With PyTorch's default the picture's colours hardly reach the latent: after ten times as
    many steps the reconstruction is still worse.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(part.weight)
    nn.init.normal_(model.quantize.embedding.weight, std=0.3)
