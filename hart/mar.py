"""The masked autoregressive transformer of MAR (arXiv 2406.11838, section 3.4).

An encoder that sees the known tokens alone, a decoder over all of them, and a diffusion head that draws a
token from what the decoder says of its place. Attention goes both ways, and what is known grows, so nothing
can be kept from step to step. Parameter names are those of the published checkpoints. Rows are those of
both guidance halves, conditional first: R = 2B, or B without guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.mar_config import MarConfig
from hart_runtime.hart.diffusion import LayerNorm, TokenDiffusion
from hart_runtime.hart.layers import Linear
from hart_runtime.hart.transformer import scaled_dot_product

Kernel = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""Attention, as :func:`hart_runtime.hart.transformer.scaled_dot_product`."""


class MarAttention(nn.Module):
    """Self-attention over all tokens, both ways. (R, N, C) -> (R, N, C)"""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, kernel: Kernel = scaled_dot_product) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(kernel(q, k, v, self.num_heads, self.scale))

    def of(self, asking: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
        """The same of some tokens, (R, n, C), which attend to all."""
        dim = x.shape[-1]
        weights, biases = self.qkv.weight.split((dim, 2 * dim)), self.qkv.bias.split((dim, 2 * dim))
        q, pairs = (
            F.linear(value.to(weight.dtype), weight, bias)
            for value, weight, bias in zip((asking, x), weights, biases, strict=True)
        )
        k, v = pairs.chunk(2, dim=-1)
        return self.proj(kernel(q, k, v, self.num_heads, self.scale))


class MarMLP(nn.Module):
    """Two layers around the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MarBlock(nn.Module):
    """Pre-norm block of a vision transformer; the stream between branches stays float32."""

    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = MarAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = MarMLP(dim, hidden)

    def forward(self, x: Tensor, kernel: Kernel = scaled_dot_product) -> Tensor:
        x = x + self.attn(self.norm1(x), kernel).float()
        return x + self.mlp(self.norm2(x)).float()

    def at(self, x: Tensor, places: Tensor, kernel: Kernel) -> Tensor:
        """The same, of some tokens of each row alone. (R, N, C), (R, n) -> (R, n, C)"""
        normed, x = self.norm1(x), at_places(x, places)
        x = x + self.attn.of(at_places(normed, places), normed, kernel).float()
        return x + self.mlp(self.norm2(x)).float()


class MarTransformer(nn.Module):
    """Encoder, decoder and diffusion head of a MAR checkpoint.

    L tokens of D channels make a picture; b buffer tokens stand in front of them in both transformers.
    """

    def __init__(self, config: MarConfig) -> None:
        super().__init__()
        self.config = config
        inside, outside, eps = config.encoder_dim, config.decoder_dim, config.norm_eps
        length = config.buffer + config.tokens
        self.fake_latent = nn.Parameter(torch.zeros(1, inside))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, inside))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, outside))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, outside))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.tokens, outside))
        self.class_emb = nn.Embedding(config.num_classes, inside)
        self.z_proj = Linear(config.token_channels, inside)
        self.z_proj_ln = LayerNorm(inside, eps=eps)
        self.encoder_blocks = nn.ModuleList(
            MarBlock(inside, config.encoder_heads, config.encoder_hidden, eps)
            for _ in range(config.encoder_depth)
        )
        self.encoder_norm = LayerNorm(inside, eps=eps)
        self.decoder_embed = Linear(inside, outside)
        self.decoder_blocks = nn.ModuleList(
            MarBlock(outside, config.decoder_heads, config.decoder_hidden, eps)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(outside, eps=eps)
        self.diffloss = TokenDiffusion(config.token_channels, outside, config.diff_width, config.diff_depth)

    def condition(self, labels: Tensor, guided: bool) -> Tensor:
        """Vectors of classes; index ``num_classes`` stands for none. (B,) -> (R, Ce)"""
        asked = self.class_vectors()[labels]
        return torch.cat([asked, self.fake_latent.float().expand_as(asked)]) if guided else asked

    def class_vectors(self) -> Tensor:
        """Of every class, and of none. (num_classes + 1, Ce)"""
        return torch.cat([self.class_emb.weight, self.fake_latent]).float()

    def embed_known(self, tokens: Tensor, places: Tensor, condition: Tensor) -> Tensor:
        """Input of the encoder: the buffer, which says the class, and the known tokens.

        Args:
            tokens: (R, K, D), the same in both halves.
            places: (R, K) int64, where in the picture they are.
            condition: (R, Ce), of :meth:`condition`.

        Returns:
            (R, b + K, Ce)
        """
        rows, buffer = condition.shape[0], self.config.buffer
        front = torch.arange(buffer, device=places.device).expand(rows, -1)
        where = torch.cat([front, buffer + places], dim=1)
        positions = F.embedding(where, self.encoder_pos_embed_learned[0]).float()
        said = condition[:, None].expand(-1, buffer, -1)
        return self.z_proj_ln(torch.cat([said, self.z_proj(tokens).float()], dim=1) + positions)

    def encode(
        self, tokens: Tensor, places: Tensor, condition: Tensor, kernel: Kernel = scaled_dot_product
    ) -> Tensor:
        """All encoder blocks, of what :meth:`embed_known` takes. -> (R, b + K, Ce)"""
        x = self.embed_known(tokens, places, condition)
        for block in self.encoder_blocks:
            x = block(x, kernel)
        return self.encoder_norm(x)

    def embed_all(self, encoded: Tensor, places: Tensor) -> Tensor:
        """Input of the decoder: the encoder's output at its places, the mask token at all others.

        Args:
            encoded: (R, b + K, Ce), of :meth:`encode`.
            places: (R, K) int64, as that was given.

        Returns:
            (R, b + L, Cd)
        """
        buffer = self.config.buffer
        x = self.decoder_embed(encoded).float()
        unknown = self.mask_token.float().expand(x.shape[0], self.config.tokens, -1)
        known = x[:, buffer:]
        tokens = unknown.scatter(1, places[..., None].expand_as(known), known)
        return torch.cat([x[:, :buffer], tokens], dim=1) + self.decoder_pos_embed_learned.float()

    def decode(self, encoded: Tensor, places: Tensor) -> Tensor:
        """All decoder blocks, of what :meth:`embed_all` takes: z of every place. -> (R, L, Cd)"""
        x = self.embed_all(encoded, places)
        for block in self.decoder_blocks:
            x = block(x)
        z = self.decoder_norm(x)[:, self.config.buffer :]
        return z + self.diffusion_pos_embed_learned.float()

    def decode_at(self, encoded: Tensor, places: Tensor, wanted: Tensor, kernel: Kernel) -> Tensor:
        """The same at some places alone, the last block with them. wanted (R, n) -> (R, n, Cd)"""
        x = self.embed_all(encoded, places)
        for block in self.decoder_blocks[:-1]:
            x = block(x, kernel)
        last = self.decoder_blocks[-1]
        assert isinstance(last, MarBlock)
        x = last.at(x, self.config.buffer + wanted, kernel)
        return self.decoder_norm(x) + F.embedding(wanted, self.diffusion_pos_embed_learned[0]).float()


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """Of every row those at its places. (R, L, C), (R, n) -> (R, n, C)"""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
