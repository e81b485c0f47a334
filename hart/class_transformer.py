"""VAR's scale transformer, a picture of a class (arXiv 2404.02905, section 3.2), and HART's of the same.

Parameter names are those of the published checkpoints. Rows are those of both guidance halves,
conditional first: 2B.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hart_runtime.common.config import ClassHartConfig, ClassTransformerConfig
from hart_runtime.hart.diffusion import WithResidual
from hart_runtime.hart.layers import Linear, PlainLayerNorm
from hart_runtime.hart.transformer import (
    Attention,
    AttentionFunction,
    Block,
    Cache,
    Gpt2MLP,
    HeadNorm,
    Pair,
    attention,
    run_blocks,
)


class ClassBlock(Block):
    """Pre-norm block whose norms hold no weights; its condition is its modulation, made beforehand."""

    def __init__(self, config: ClassTransformerConfig) -> None:
        nn.Module.__init__(self)
        dim = config.embed_dim
        self.ln_wo_grad = PlainLayerNorm(dim, config.norm_eps)  # type: ignore[assignment]
        self.attn = Attention(config)
        self.ffn = Gpt2MLP(config)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def modulation_of(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """Class embeddings (2B, C) to (2B, 6, C): gamma1, gamma2, scale1, scale2, shift1, shift2."""
        if shared is not None:
            return self.ada_gss[0].float() + shared
        return self.ada_lin(condition).float().unflatten(-1, (6, -1))

    def _modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        return condition.chunk(6, dim=1)


class ClassTransformer(nn.Module):
    """Embeddings, blocks and head of a VAR checkpoint."""

    def __init__(self, config: ClassTransformerConfig, vocab_size: int, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        dim, sides = config.embed_dim, config.patch_nums
        self.word_embed = Linear(latent_channels, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.zeros(1, sides[0] ** 2, dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, sum(n * n for n in sides), dim))
        self.lvl_embed = nn.Embedding(len(sides), dim)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(ClassBlock(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(PlainLayerNorm(dim, config.norm_eps), dim)
        self.head = Linear(dim, vocab_size)

    def condition(self, labels: Tensor) -> Tensor:
        """Embeddings of both guidance halves; index ``num_classes`` stands for no class. (B,) -> (2B, C)"""
        asked = self.class_emb(labels).float()
        nothing = self.class_emb.weight[self.config.num_classes :].float()
        return torch.cat([asked, nothing.expand_as(asked)])

    def modulations(self, condition: Tensor) -> Tensor:
        """What modulates every block, the same at every scale. (2B, C) -> (2B, depth, 6, C)"""
        shared = None
        if self.config.shared_aln:
            shared = self.shared_ada_lin(condition).float().unflatten(-1, (6, -1))
        blocks = (cast(ClassBlock, block) for block in self.blocks)
        return torch.stack([block.modulation_of(condition, shared) for block in blocks], dim=1)

    def places(self) -> Tensor:
        """Embeddings of level and position, one for each token of all scales. (L, C)"""
        levels = [level for level, side in enumerate(self.config.patch_nums) for _ in range(side * side)]
        numbers = torch.tensor(levels, device=self.pos_1LC.device)
        return self.pos_1LC[0].float() + self.lvl_embed(numbers).float()

    def start(self, condition: Tensor) -> Tensor:
        """Input of the first scale. (2B, C) -> (2B, n * n, C)"""
        first = self.pos_start.float() + self.places()[: self.pos_start.shape[1]]
        return condition[:, None] + first

    def embed_tokens(self, latents: Tensor, scale: int) -> Tensor:
        """Input of a later scale. (B, n * n, Cv) cells of f_hat -> (B, n * n, C)"""
        begin = sum(n * n for n in self.config.patch_nums[:scale])
        places = self.places()[begin : begin + latents.shape[1]]
        return self.word_embed(latents).float() + places

    def forward(
        self,
        x: Tensor,
        modulations: Tensor,
        cache: Cache | None,
        attend: AttentionFunction = attention,
    ) -> tuple[Tensor, list[Pair]]:
        """All blocks over the new tokens of one scale.

        Args:
            x: (2B, L, C) new tokens.
            modulations: (2B, depth, 6, C), of :meth:`modulations`.
            cache, attend: as for :meth:`hart_runtime.hart.transformer.ScaleTransformer.forward`.

        Returns:
            hidden (2B, L, C) float32, and per block what ``attend`` keeps: the grown cache.
        """
        return run_blocks(self.blocks, x, None, modulations.unbind(1), cache, attend)

    def logits(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """(2B, L, C) hidden states -> (2B, L, V) float32 logits of both halves."""
        return self.head(self.head_nm(hidden, condition)).float()


class ClassHartTransformer(ClassTransformer, WithResidual):
    """VAR's blocks with HART's residual diffusion behind the last scale (arXiv 2410.10812, section 3.2)."""

    def __init__(self, config: ClassHartConfig, vocab_size: int, latent_channels: int) -> None:
        super().__init__(config, vocab_size, latent_channels)
        self.add_residual(config, latent_channels)
