"""Qwen2 text encoder: token ids to the hidden states after the last norm.

Qwen2 (arXiv 2407.10671): pre-norm decoder blocks with grouped-query attention, biased
q/k/v projections, rotary positions in halves and a SwiGLU MLP. Only what a text encoder
needs; there is no generation. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.config import TextEncoderConfig
from hart_runtime.hart.layers import Linear, RMSNorm
from hart_runtime.hart.rope import Rotation, apply_rope


class SelfAttention(nn.Module):
    """Grouped-query attention over the tokens given and, where there is one, a fixed prefix."""

    prefix_key: Tensor | None
    prefix_value: Tensor | None
    """(1, P, key and value heads, head_dim): tokens that precede those of every call."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        dim, head_dim = config.hidden_size, config.head_dim
        kv_dim = config.num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = Linear(dim, config.num_attention_heads * head_dim)
        self.k_proj = Linear(dim, kv_dim)
        self.v_proj = Linear(dim, kv_dim)
        self.o_proj = Linear(config.num_attention_heads * head_dim, dim, bias=False)
        self.register_buffer("prefix_key", None, persistent=False)
        self.register_buffer("prefix_value", None, persistent=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, scaled, rotated keys, and values, (B, T, heads, head_dim) each.

        The scale belongs to the queries: in half precision a sum over a published model's channels goes
        past what half can hold before it would be scaled.
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        scaled = apply_rope(q, rotation) * self.head_dim**-0.5
        return scaled.to(v.dtype), apply_rope(k, rotation).to(v.dtype), v

    def forward(self, x: Tensor, rotation: Rotation, visible: Tensor) -> Tensor:
        q, k, v = self.project(x, rotation)
        if self.prefix_key is not None and self.prefix_value is not None:
            k = torch.cat([self.prefix_key.expand(x.shape[0], -1, -1, -1), k], dim=1)
            v = torch.cat([self.prefix_value.expand(x.shape[0], -1, -1, -1), v], dim=1)
        k, v = (t.repeat_interleave(self.groups, dim=2).transpose(1, 2) for t in (k, v))
        scores = (q.transpose(1, 2) @ k.transpose(2, 3)).float()
        weights = scores.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(dim, hidden, bias=False)
        self.up_proj = Linear(dim, hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, visible).float()
        return x + self.mlp(self.post_attention_layernorm(x)).float()


class TextEncoder(nn.Module):
    """(B, T) token ids and mask to (B, T, hidden_size) features, padded positions included."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.prefix_length = 0

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, T) bool: padded tokens are never attended to, positions simply count.

        A token that sees nothing at all, which takes padding on the left and no prefix, averages
        the values of all tokens.
        """
        prefix, total = self.prefix_length, self.prefix_length + input_ids.shape[1]
        positions = torch.arange(prefix, total, device=input_ids.device)
        if prefix:
            mask = torch.cat([mask.new_ones(mask.shape[0], prefix), mask], dim=1)
        causal = positions[:, None] >= torch.arange(total, device=input_ids.device)
        visible = causal & mask[:, None, None, :]  # query row sees key column
        rotation = self._rotation(positions)
        x = self.embed_tokens(input_ids).float()
        for layer in self.layers:
            x = layer(x, rotation, visible)
        return self.norm(x)

    @torch.no_grad()
    def set_prefix(self, tokens: Sequence[int]) -> None:
        """Put tokens in front of every call: a system prompt, whose keys and values never change.

        They are computed in float32, whatever the weights' type, and kept in that type.
        """
        device = self.embed_tokens.weight.device
        positions = torch.arange(len(tokens), device=device)
        visible = positions[:, None] >= positions
        rotation = self._rotation(positions)
        x = self.embed_tokens(torch.tensor([list(tokens)], device=device)).float()
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            exact = copy.deepcopy(layer).float()  # one at a time: the encoder may be large
            exact.self_attn.prefix_key = exact.self_attn.prefix_value = None
            dtype = layer.self_attn.k_proj.weight.dtype
            _, key, value = exact.self_attn.project(exact.input_layernorm(x), rotation)
            layer.self_attn.prefix_key, layer.self_attn.prefix_value = key.to(dtype), value.to(dtype)
            x = exact(x, rotation, visible)
        self.prefix_length = len(tokens)

    def _rotation(self, positions: Tensor) -> Rotation:
        head_dim = self.config.head_dim
        exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
        angles = positions[:, None].float() * (1.0 / self.config.rope_theta**exponent)
        return Rotation.of(torch.cat([angles, angles], dim=-1)[None])
