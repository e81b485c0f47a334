"""The scale transformer: a whole token map per step, with a KV cache.

HART (arXiv 2410.10812), section 3. Parameter names are those of the published
checkpoints. Rows are those of both guidance halves, conditional first: 2B. (Exported graphs run the
text in the conditional half alone: its other half is a constant.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.config import ClassTransformerConfig, TransformerConfig
from hart_runtime.hart.diffusion import WithResidual
from hart_runtime.hart.layers import Linear, RMSNorm, TimestepEmbedder
from hart_runtime.hart.rope import Rotation, apply_rope

Pair = tuple[Tensor, Tensor]
"""Keys (after rotation) and values of one block, (2B, L, C) each."""
Cache = Sequence[Pair]
"""Those of every block."""
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Pair | None, int, float], tuple[Tensor, Pair]]
"""Attention over the cache and the new tokens, and what is kept of both; see :func:`attention`."""

MAX_LOG_SCALE = math.log(100)


class Context(NamedTuple):
    """The projected text of both guidance halves and what is pooled from it."""

    tokens: Tensor
    """(2B, T, C), before the level embedding."""
    head_condition: Tensor
    """(2B, C): maximum over all T tokens, padding included."""
    block_condition: Tensor
    """(2B, C): pooled the way the adaLN variants ask for; unused by the plain variant."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over heads laid side by side. q (B, L, C); k, v (B, T, C)"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, past: Pair | None, num_heads: int, scale: float
) -> tuple[Tensor, Pair]:
    """Attend to the cache and the new tokens; returns the grown cache, too. q, k, v (B, L, C)"""
    if past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    return scaled_dot_product(q, k, v, num_heads, scale), (k, v)


class Attention(nn.Module):
    """Self-attention over the cache and the new tokens.

    The softmax scale is a quarter of the usual 1/sqrt(dh). There is no key bias. HART's tokens are rotated
    by their places; VAR's carry them in an embedding.
    """

    def __init__(self, config: TransformerConfig | ClassTransformerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(config.head_dim)
        self.qkv_proj = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.num_heads, 1, 1), math.log(4)))

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        past: Pair | None,
        attend: AttentionFunction,
    ) -> tuple[Tensor, Pair]:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # (2B, L, C) each
        q = (q + self.q_bias).unflatten(-1, (self.num_heads, -1))
        k = k.unflatten(-1, (self.num_heads, -1))
        v = v + self.v_bias
        if hasattr(self, "scale_mul_1H11"):
            gain = self.scale_mul_1H11.transpose(1, 2).float().clamp_max(MAX_LOG_SCALE).exp()
            q = F.normalize(q.float(), dim=-1) * gain
            k = F.normalize(k.float(), dim=-1)
        dtype = self.qkv_proj.weight.dtype
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        q, k = q.to(dtype).flatten(2), k.to(dtype).flatten(2)
        attended, present = attend(q, k, v.to(dtype), past, self.num_heads, self.scale)
        return self.proj(attended), present


class LlamaMLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, config.mlp_hidden
        self.gate_proj = Linear(dim, hidden, bias=False)
        self.up_proj = Linear(dim, hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gpt2MLP(nn.Module):
    def __init__(self, config: TransformerConfig | ClassTransformerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.mlp_hidden)
        self.fc2 = Linear(config.mlp_hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block; one norm weight serves both branches.

    Three kinds of conditioning: none, adaLN of its own (``ada_lin``), or a learned table plus
    the pooled context.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.ln_wo_grad = RMSNorm(dim, config.norm_eps)
        self.attn = Attention(config)
        self.ffn = LlamaMLP(config) if config.mlp_type == "llama" else Gpt2MLP(config)
        if not config.disable_aln:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        elif config.shared_aln:
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        condition: Tensor,
        past: Pair | None,
        attend: AttentionFunction,
    ) -> tuple[Tensor, Pair]:
        modulation = self._modulation(condition)
        if modulation is None:
            h, present = self.attn(self.ln_wo_grad(x), rotation, past, attend)
            x = x + h.float()
            return x + self.ffn(self.ln_wo_grad(x)).float(), present
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation  # (2B, 1, C) each
        h, present = self.attn(self.ln_wo_grad(x) * (1 + scale1) + shift1, rotation, past, attend)
        x = x + h.float() * gamma1
        h = self.ffn(self.ln_wo_grad(x) * (1 + scale2) + shift2)
        return x + h.float() * gamma2, present

    def _modulation(self, condition: Tensor) -> tuple[Tensor, ...] | None:
        if hasattr(self, "ada_lin"):
            return self.ada_lin(condition).float().unsqueeze(1).chunk(6, dim=-1)
        if hasattr(self, "scale_shift_table"):
            return (self.scale_shift_table.float() + condition[:, None]).chunk(6, dim=1)
        return None


class HeadNorm(nn.Module):
    """Conditional norm before the vocabulary projection, present in every variant."""

    def __init__(self, norm: nn.Module, dim: int) -> None:
        super().__init__()
        self.ln_wo_grad = norm
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).float().unsqueeze(1).chunk(2, dim=-1)
        normed: Tensor = self.ln_wo_grad(x)
        return normed * (1 + scale) + shift


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    rotation: Rotation | None,
    conditions: Iterable[Tensor],
    cache: Cache | None,
    attend: AttentionFunction,
) -> tuple[Tensor, list[Pair]]:
    """Block after block, each with its condition and its part of the cache.

    Returns:
        x, and per block what ``attend`` keeps.
    """
    present = []
    pasts = cache or itertools.repeat(None)
    for block, condition, past in zip(blocks, conditions, pasts):  # noqa: B905 - endless, or as many as blocks
        x, pair = block(x, rotation, condition, past, attend)
        present.append(pair)
    return x, present


class ScaleTransformer(WithResidual):
    """Everything in ``llm/``: embeddings, blocks, heads and the residual diffusion MLP."""

    def __init__(self, config: TransformerConfig, vocab_size: int, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.word_embed = Linear(latent_channels, dim)
        self.context_norm = (
            RMSNorm(config.context_dim, config.norm_eps) if config.use_context_norm else nn.Identity()
        )
        self.context_embed = Linear(config.context_dim, dim)
        self.lvl_embed = (
            TimestepEmbedder(dim) if config.use_timestep_embed else nn.Embedding(len(config.patch_nums), dim)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(RMSNorm(dim, config.norm_eps), dim)
        self.head = Linear(dim, vocab_size)
        self.add_residual(config, latent_channels)

    def level_embeddings(self, num_scales: int) -> Tensor:
        """Level 0 is the context, level k the k-th scale. (S, C)"""
        levels = torch.arange(num_scales, device=self.head.weight.device)
        return self.lvl_embed(levels).float()

    def project_context(self, features: Tensor, mask: Tensor) -> Context:
        """Project and pool text features. ``features`` (N, T, context_dim), ``mask`` (N, T) bool."""
        tokens = self.context_embed(self.context_norm(features)).float()
        maximum = tokens.amax(1)
        pooled = maximum
        if self.config.condition_pooling == "avg":
            weight = mask[..., None].float()
            pooled = (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)
        return Context(tokens, maximum, pooled)

    def context(self, features: Tensor, mask: Tensor) -> Context:
        """Both guidance halves of a batch. ``features`` (B, T, context_dim), ``mask`` (B, T) bool.

        The unconditional half is the same projection of all-zero features; its mask keeps
        only token 0.
        """
        alone = torch.cat([torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, 1:])], dim=1)
        return self.project_context(
            torch.cat([features, torch.zeros_like(features)]), torch.cat([mask, alone])
        )

    def embed_tokens(self, latents: Tensor, level: Tensor) -> Tensor:
        """Input of an image scale. (B, L, Cv) cells of f_hat + (C,) or (L, C) level -> (B, L, C)"""
        return self.word_embed(latents).float() + level

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        condition: Tensor,
        cache: Cache | None,
        attend: AttentionFunction = attention,
    ) -> tuple[Tensor, list[Pair]]:
        """All blocks over the new tokens of one scale (scale 0: the text context).

        Args:
            x: (2B, L, C) new tokens.
            angles: (2B, L, dh) rotary angles of the new tokens.
            condition: (2B, C) pooled context for the adaLN variants.
            cache: per block keys and values of everything before, or None at scale 0.
            attend: attention and its form of the cache; the export passes its own.

        Returns:
            hidden (2B, L, C) float32, and per block what ``attend`` keeps: the grown cache.
        """
        return run_blocks(self.blocks, x, Rotation.of(angles), itertools.repeat(condition), cache, attend)

    def logits(self, hidden: Tensor, head_condition: Tensor) -> Tensor:
        """(2B, L, C) hidden states -> (2B, L, V) float32 logits of both halves."""
        return self.head(self.head_nm(hidden, head_condition)).float()
