"""Training losses of the tokenizer and of the transformer with its diffusion head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hart_runtime.common.schedule import PUBLISHED_TOP_K, cell_positions
from hart_runtime.hart.class_transformer import ClassTransformer
from hart_runtime.hart.diffusion import WithResidual
from hart_runtime.hart.quantizer import HybridQuantizer, shrink
from hart_runtime.hart.rope import context_angles, image_angles
from hart_runtime.hart.sampling import draw_codes, truncate
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import AttentionFunction, Pair, ScaleTransformer

LABEL_DROP = 0.1
"""Share of pictures that a model of classes learns without theirs (VAR, appendix)."""


def tokenizer_loss(
    tokenizer: ImageTokenizer,
    images: Tensor,
    patch_nums: Sequence[int],
    discrete_share: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Reconstruction plus quantizer loss; a share of the pictures decodes its discrete latent.

    HART, section 3.1: the decoder sees the discrete and the continuous latent in turn, so
    that it serves both. ``images`` (B, 3, H, W) in [-1, 1]; ``patch_nums`` is the pyramid for
    that size, which may be a crop.
    """
    f = tokenizer.latent(images)
    f_hat, quantizer_loss = quantize_with_loss(tokenizer, f, patch_nums)
    discrete = torch.rand(len(f), 1, 1, 1, generator=generator).to(f.device) < discrete_share
    straight_through = f + (f_hat - f).detach()
    pixels = tokenizer.decode_unclamped(torch.where(discrete, straight_through, f))
    return {"reconstruction": F.mse_loss(pixels, images), "quantizer": quantizer_loss}


def quantize_with_loss(
    tokenizer: ImageTokenizer, f: Tensor, patch_nums: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """f_hat of the last scale, and the codebook and commitment loss averaged over scales."""
    quantizer = tokenizer.quantize
    with torch.no_grad():
        indices = quantizer.encode(f, patch_nums).indices
    target = f.detach()
    loss = f.new_zeros(())
    f_hats = quantizer.accumulate(indices, patch_nums)
    for f_hat in f_hats:
        commitment = F.mse_loss(f, f_hat.detach())
        loss = loss + F.mse_loss(f_hat, target) + tokenizer.config.beta * commitment
    return f_hats[-1], loss / len(patch_nums)


def transformer_loss(
    transformer: ScaleTransformer,
    quantizer: HybridQuantizer,
    features: Tensor,
    mask: Tensor,
    indices: Sequence[Tensor],
    rest: Tensor,
    generator: torch.Generator,
    balance: float = 0.0,
    residual_share: float = 1.0,
) -> dict[str, Tensor]:
    """Cross entropy over all scales and the diffusion loss of the last scale's residual.

    Args:
        features: (B, T, context_dim) text features; a share is dropped for guidance.
        mask: (B, T) bool.
        indices: per scale (B, n * n) int64, from the tokenizer.
        rest: (B, Cv, P, P) continuous rest before the last discrete scale.
        balance: weight of a token is (tokens of its scale) ** -balance; 0 weighs tokens alike,
            as published, 1 weighs scales alike.
        residual_share: share of the last scale's tokens that the diffusion loss looks at.
    """
    config = transformer.config
    patch_nums, head_dim = config.patch_nums, config.head_dim
    keep = torch.rand(len(features), generator=generator) >= config.cond_drop_rate
    keep = keep.to(features.device)
    position_ids = (mask.long().cumsum(1) - 1) * keep[:, None]
    first = torch.zeros_like(mask)
    first[:, 0] = True
    context = transformer.project_context(
        features * keep[:, None, None], torch.where(keep[:, None], mask, first)
    )
    levels = transformer.level_embeddings(len(patch_nums))

    inputs, angles = [context.tokens + levels[0]], [context_angles(position_ids, head_dim)]
    for k, cells in enumerate(_cells(quantizer, indices, patch_nums), start=1):
        inputs.append(transformer.embed_tokens(cells, levels[k]))
        positions = torch.from_numpy(cell_positions(patch_nums[k], patch_nums[-1])).to(features.device)
        angles.append(image_angles(positions + position_ids[:, -1:, None], head_dim))
    hidden, _ = transformer(
        torch.cat(inputs, 1), torch.cat(angles, 1), context.block_condition, None, _in_scales(inputs)
    )
    hidden = hidden[:, config.context_token - 1 :]
    logits = transformer.logits(hidden, context.head_condition)
    mended = _diffusion(transformer, quantizer, hidden, logits, rest, residual_share, generator)
    return {"cross_entropy": _cross_entropy(logits, indices, patch_nums, balance), "diffusion": mended}


def class_transformer_loss(
    transformer: ClassTransformer,
    quantizer: HybridQuantizer,
    labels: Tensor,
    indices: Sequence[Tensor],
    rest: Tensor,
    generator: torch.Generator,
    balance: float = 0.0,
    residual_share: float = 1.0,
) -> dict[str, Tensor]:
    """The same of a model that draws classes; the diffusion loss only where there is a residual.

    Args:
        labels: (B,) int64; a share is dropped for guidance.
        indices, rest, balance, residual_share: as for :func:`transformer_loss`.
    """
    config = transformer.config
    drop = torch.rand(len(labels), generator=generator) < LABEL_DROP
    condition = transformer.class_emb(labels.masked_fill(drop.to(labels.device), config.num_classes)).float()
    inputs = [transformer.start(condition)]
    for k, cells in enumerate(_cells(quantizer, indices, config.patch_nums), start=1):
        inputs.append(transformer.embed_tokens(cells, k))
    modulations = transformer.modulations(condition)
    hidden, _ = transformer(torch.cat(inputs, 1), modulations, None, _in_scales(inputs))
    logits = transformer.logits(hidden, condition)
    losses = {"cross_entropy": _cross_entropy(logits, indices, config.patch_nums, balance)}
    if isinstance(transformer, WithResidual):
        mended = _diffusion(transformer, quantizer, hidden, logits, rest, residual_share, generator)
        losses["diffusion"] = mended
    return losses


@torch.no_grad()
def _cells(quantizer: HybridQuantizer, indices: Sequence[Tensor], patch_nums: Sequence[int]) -> list[Tensor]:
    """What f_hat is at every scale but the first, (B, n * n, Cv) each."""
    f_hats = quantizer.accumulate(indices, patch_nums)
    pairs = zip(f_hats[:-1], patch_nums[1:], strict=True)
    return [shrink(f_hat, n).flatten(2).transpose(1, 2) for f_hat, n in pairs]


def _in_scales(inputs: Sequence[Tensor]) -> AttentionFunction:
    """Attention of all scales at once: a token sees its own and all before it. Inputs are (B, L, C)."""
    lengths = torch.tensor([x.shape[1] for x in inputs])
    order = torch.arange(len(inputs)).repeat_interleave(lengths).to(inputs[0].device)
    visible = order[:, None] >= order

    def attend(
        q: Tensor, k: Tensor, v: Tensor, past: Pair | None, num_heads: int, scale: float
    ) -> tuple[Tensor, Pair]:
        a, b, c = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        h = F.scaled_dot_product_attention(a, b, c, attn_mask=visible, scale=scale)
        return h.transpose(1, 2).flatten(2), (k, v)

    return attend


def _cross_entropy(
    logits: Tensor, indices: Sequence[Tensor], patch_nums: Sequence[int], balance: float
) -> Tensor:
    tokens = torch.cat([torch.full((n * n,), float(n * n)) for n in patch_nums]).to(logits.device)
    weight = tokens**-balance
    weight = weight / weight.mean()
    entropies = F.cross_entropy(logits.transpose(1, 2), torch.cat(list(indices), 1), reduction="none")
    return (entropies * weight).mean()


def _diffusion(
    transformer: WithResidual,
    quantizer: HybridQuantizer,
    hidden: Tensor,
    logits: Tensor,
    rest: Tensor,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Loss of the residual at a share of the last scale's tokens."""
    rest = rest.flatten(2).transpose(1, 2)
    last = rest.shape[1]
    count = max(1, round(last * share))
    chosen = torch.randperm(last, generator=generator)[:count].to(logits.device)
    hidden, logits = hidden[:, -last:][:, chosen], logits[:, -last:][:, chosen]
    with torch.no_grad():  # the residual must mend the codes that sampling draws
        kept = truncate(logits, min(PUBLISHED_TOP_K, logits.shape[-1]), 0.96)
        uniform = torch.rand(kept.shape[:2], generator=generator).to(kept.device)
        codes = quantizer.embedding(draw_codes(kept, uniform))
    z = transformer.residual_condition(hidden, codes)
    residual = rest[:, chosen] - codes
    return transformer.diffloss.loss(z.flatten(0, 1), residual.flatten(0, 1), generator)
