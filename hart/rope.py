"""Rotary position angles, in HART's own layout (float32 at any precision).

Context tokens use the standard 1-D rotary embedding. Image tokens lay the angles out in
quarters [row, row, column, column] while the rotation pairs channel a with a + dh/2, so
each pair mixes a row angle with a column angle. It is not a rotation, and a textbook
axial embedding does not reproduce it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10000.0


def context_angles(position_ids: Tensor, head_dim: int) -> Tensor:
    """Angles of text tokens. (B, T) positions -> (B, T, head_dim)"""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / BASE**exponent)
    return torch.cat([angles, angles], dim=-1)


def image_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles of image tokens. (B, L, 2) row and column -> (B, L, head_dim)"""
    exponent = torch.arange(0, head_dim, 4, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / BASE**exponent
    row = positions[..., 0:1].float() * frequencies
    column = positions[..., 1:2].float() * frequencies
    return torch.cat([row, row, column, column], dim=-1)


class Rotation(NamedTuple):
    """Cosine and sine of the angles of a run of tokens, (B, L, 1, head_dim) each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor) -> Rotation:
        """Angles (B, L, head_dim) are turned into numbers once, for all heads and blocks."""
        return cls(angles.cos()[:, :, None], angles.sin()[:, :, None])


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Compute x * cos + rotate_half(x) * sin. (B, L, H, head_dim), float32 result"""
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin
