"""Small layers the networks share. Sums, norms and angles stay float32 at any precision."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Linear layer that takes float32 or half input and computes in its weight's precision.

    The residual stream is float32 throughout, as under the autocast of the published
    sampler; only matrix products run in half precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class PlainLayerNorm(nn.Module):
    """LayerNorm without weights, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (self.dim,), eps=self.eps)


class TimestepEmbedder(nn.Module):
    """Sinusoid of a number (a timestep or a level), then a two-layer MLP. (N,) -> (N, C)"""

    FREQUENCIES = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * self.FREQUENCIES, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.FREQUENCIES
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)).float()
