"""From logits to codes: guidance, truncation, the categorical draw and the smooth mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from hart_runtime.common.schedule import ScaleStep


def guide_logits(logits: Tensor, guidance: float) -> Tensor:
    """(1 + t) * cond - t * uncond. (2B, n, V) -> (B, n, V)"""
    conditional, unconditional = logits.unflatten(0, (2, -1)).unbind()
    return (1 + guidance) * conditional - guidance * unconditional


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set everything outside top-k, then outside the nucleus, to -inf. (B, n, V) -> (B, n, V)

    Both rules are a lower bound on the logit, so ties with the last one kept are kept.
    Nucleus: in ascending order, whatever lies within the first 1 - top_p of the mass goes,
    but never the largest.
    """
    kept = logits.topk(top_k, dim=-1).values  # descending
    bound = kept[..., -1:]
    if top_p > 0:
        tail = kept.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # mass of an entry and all below it
        keep = tail > 1 - top_p
        keep[..., 0] = True
        bound = torch.where(keep, kept, torch.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < bound, -torch.inf)


def draw_codes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling in vocabulary order. (B, n, V), (B, n) -> (B, n) int64"""
    cumulative = logits.softmax(-1).double().cumsum(-1)
    target = uniform.double()[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(-1).clamp_max(logits.shape[-1] - 1)


def windows(pool: Tensor, start: Tensor, vocab_size: int) -> Tensor:
    """What every token sees of a pool, from its own start on. (B, P), (B, n) -> (B, n, V)"""
    pictures = torch.arange(len(pool), device=pool.device)[:, None]
    return pool.unfold(1, vocab_size, 1)[pictures, start]


def smooth_codes(logits: Tensor, exponential: Tensor, codebook: Tensor, step: ScaleStep) -> Tensor:
    """Gumbel-softmax mixture of codes over the truncated logits. (B, n, V) -> (B, n, Cv)"""
    gumbel = -exponential.log()
    weights = ((step.logit_gain * logits + gumbel) / step.temperature).softmax(-1)
    return weights @ codebook
