"""Convolutional encoder and decoder of the image tokenizer.

The VQGAN architecture (Esser et al., 2021) as VAR configured it: GroupNorm with 32
groups, self-attention at the lowest resolution and in the middle, two residual blocks
a level in the encoder and three in the decoder. MAR's tokenizer is the same but for the
decoder's lowest resolution, which attends in the middle only, and for the names of the
attention's weights. Module names are those of the published checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_BLOCKS = 2
DECODER_BLOCKS = 3


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in float32 whatever the precision of the convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=32, num_channels=channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a shortcut. (B, Cin, H, W) -> (B, Cout, H, W)"""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, written out.

    Its head is as wide as the feature map, wider than fused attention kernels accept.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of normed features. (B, C, H, W) -> (B, C, H * W) each"""
        return self.qkv(x).flatten(2).chunk(3, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.projections(self.norm(x))
        scores = (q * channels**-0.5).transpose(1, 2) @ k  # (B, HW, HW)
        weights = scores.float().softmax(-1).to(v.dtype)
        h = v @ weights.transpose(1, 2)  # (B, C, HW)
        return x + self.proj_out(h.reshape(batch, channels, height, width))


class SplitAttnBlock(AttnBlock):
    """The same with one convolution for each of the three, as MAR's tokenizer has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.qkv
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros to the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, attention: type[AttnBlock]) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = attention(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """All blocks of one resolution, and the step to the next one if there is one."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, attention: type[AttnBlock] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(attention(channels) for _ in range(blocks) if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for step in (self.downsample, self.upsample):
            if step is not None:
                x = step(x)
        return x


class Encoder(nn.Module):
    """Pixels in [-1, 1], (B, 3, H, W), to features (B, z_channels, H / f, W / f)."""

    def __init__(
        self,
        ch: int,
        ch_mult: tuple[int, ...],
        z_channels: int,
        attention: type[AttnBlock] = AttnBlock,
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            inputs = widths[i - 1] if i else ch
            level = Level(inputs, width, ENCODER_BLOCKS, attention if lowest else None)
            if not lowest:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], attention)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to pixels, unclamped, (B, 3, h * f, w * f)."""

    def __init__(
        self,
        ch: int,
        ch_mult: tuple[int, ...],
        z_channels: int,
        attention: type[AttnBlock] = AttnBlock,
        middle_only: bool = False,
    ) -> None:
        """``middle_only`` leaves the attention of the lowest resolution's own blocks out."""
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention)
        levels = []
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            inputs = widths[-1] if lowest else widths[i + 1]
            own = attention if lowest and not middle_only else None
            level = Level(inputs, width, DECODER_BLOCKS, own)
            if i:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)  # index 0 is the full resolution, run last
        self.norm_out = GroupNorm(ch * ch_mult[0])
        self.conv_out = nn.Conv2d(ch * ch_mult[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
