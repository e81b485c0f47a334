"""Qwen2 text encoder: token ids to the hidden states after the last norm.

Qwen2 (arXiv 2407.10671): pre-norm decoder blocks with grouped-query attention, biased
q/k/v projections, rotary positions in halves and a SwiGLU MLP. Only what a text encoder
needs; there is no generation. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart.config import TextEncoderConfig
from hart.layers import Linear, RMSNorm
from hart.rope import Rotation, apply_rope


class SelfAttention(nn.Module):
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

    def forward(self, x: Tensor, rotation: Rotation, visible: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rotation).to(v.dtype), apply_rope(k, rotation).to(v.dtype)
        k, v = (t.repeat_interleave(self.groups, dim=2).transpose(1, 2) for t in (k, v))
        scores = (q.transpose(1, 2) @ k.transpose(2, 3)).float() * self.head_dim**-0.5
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

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, T) bool: padded tokens are never attended to, positions simply count."""
        config, length = self.config, input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        causal = positions[:, None] >= positions  # (T, T): query row sees key column
        visible = causal & mask[:, None, None, :]
        exponent = torch.arange(0, config.head_dim, 2, device=input_ids.device) / config.head_dim
        angles = positions[:, None].float() * (1.0 / config.rope_theta**exponent)
        rotation = Rotation.of(torch.cat([angles, angles], dim=-1)[None])
        x = self.embed_tokens(input_ids).float()
        for layer in self.layers:
            x = layer(x, rotation, visible)
        return self.norm(x)
