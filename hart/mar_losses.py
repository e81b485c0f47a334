"""Training losses of a masked autoregressive model and of its tokenizer (arXiv 2406.11838)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.losses import LABEL_DROP
from hart_runtime.hart.mar import MarTransformer, at_places

LEAST_MASKED = 0.7
"""Share of tokens that are unknown at the least while it learns (section 4)."""
REPEATS = 4
"""Of a token, in the published training (section 4)."""


def kl_tokenizer_loss(
    tokenizer: KlTokenizer, images: Tensor, weight: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Reconstruction of a sampled latent, and how far its distribution is from a normal one.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        weight: of the second, per number of the latent.
    """
    mean, log_variance = tokenizer.encode(images)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    pixels = tokenizer.decode(mean + torch.exp(log_variance / 2) * noise)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"reconstruction": F.mse_loss(pixels, images), "divergence": weight * divergence}


def masked_loss(
    transformer: MarTransformer,
    labels: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
    repeats: int = REPEATS,
) -> dict[str, Tensor]:
    """Diffusion loss of the tokens that the encoder does not see, of as many in every picture.

    Args:
        labels: (B,) int64; a share is dropped for guidance.
        tokens: (B, L, D).
        repeats: noises that every token is seen with, for one run of encoder and decoder.
    """
    config, batch = transformer.config, len(tokens)
    share = LEAST_MASKED + (1 - LEAST_MASKED) * float(torch.rand((), generator=generator))
    unknown = max(1, round(config.tokens * share))
    orders = torch.stack([torch.randperm(config.tokens, generator=generator) for _ in range(batch)])
    wanted, known = (part.sort(dim=1).values.to(tokens.device) for part in orders.tensor_split([unknown], 1))
    drop = (torch.rand(batch, generator=generator) < LABEL_DROP).to(tokens.device)
    condition = transformer.condition(labels.masked_fill(drop, config.num_classes), guided=False)
    encoded = transformer.encode(at_places(tokens, known), known, condition)
    z = at_places(transformer.decode(encoded, known), wanted)
    z, target = (part.flatten(0, 1).repeat(repeats, 1) for part in (z, at_places(tokens, wanted)))
    return {"diffusion": transformer.diffloss.loss(z, target, generator)}
