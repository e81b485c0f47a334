"""The image decoder and encoder in strips of rows, for feature maps that are too large to have many of.

Above the lowest resolution both only work pixel by pixel, look one row up and down
(3 x 3 convolutions) or take means over a whole map (GroupNorm), so they can follow a map strip by
strip. What comes out is what the whole map gives, up to the order of sums, while a norm, an
activation or a copy is never larger than a strip: two maps are alive at once, and not five.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.hart.autoencoder import (
    Decoder,
    Downsample,
    Encoder,
    GroupNorm,
    Level,
    ResnetBlock,
    Upsample,
)

STRIPS = 4
"""More strips need less memory and make a larger graph, whose export takes longer."""
LARGE = 1 << 26
"""Elements of one picture's feature map from which on it is cut."""

Strips = list[Tensor]
"""A feature map from top to bottom, (B, C, rows, W) each; a single one is not cut yet."""


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """What ``decoder(z)`` returns. (B, z_channels, h, w) -> (B, 3, h * f, w * f), unclamped"""
    strips = [decoder.mid(decoder.conv_in(z))]
    for part in reversed(decoder.up):
        level = cast(Level, part)
        if len(level.attn):
            strips = [level(strips[0])]
            continue
        for item in level.block:
            block = cast(ResnetBlock, item)
            strips = _residual_block(block, _cut(strips, block.conv2.out_channels, 1))
        if level.upsample is not None:
            upsample = cast(Upsample, level.upsample)
            strips = _upsample(upsample, _cut(strips, upsample.conv.out_channels, 2))
    return torch.cat(_norm_silu_convolve(decoder.norm_out, decoder.conv_out, strips), dim=2)


def encode(encoder: Encoder, image: Tensor) -> Tensor:
    """What ``encoder(image)`` returns. (B, 3, h * f, w * f) -> (B, z_channels, h, w)"""
    factor = 2 ** (len(encoder.down) - 1)
    strips = _cut_evenly(image, encoder.conv_in.out_channels, factor)
    strips = [_convolve(encoder.conv_in, _with_neighbours(strips, i), strips, i) for i in range(len(strips))]
    for part in encoder.down:
        level = cast(Level, part)
        strips = _joined(strips, cast(ResnetBlock, level.block[0]).conv2.out_channels)
        if len(level.attn):
            strips = [level(torch.cat(strips, dim=2))]
            continue
        for item in level.block:
            strips = _residual_block(cast(ResnetBlock, item), strips)
        if level.downsample is not None:
            strips = _downsample(cast(Downsample, level.downsample), strips)
    x = torch.cat(strips, dim=2)
    return cast(Tensor, encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(x)))))


def _cut_evenly(image: Tensor, channels: int, factor: int) -> Strips:
    """Cut a picture, if it becomes a large map, so that every strip's sides can be divided by the factor."""
    height, width = image.shape[2:]
    if channels * height * width < LARGE:
        return [image]
    rows = [len(part) * factor for part in np.array_split(range(height // factor), STRIPS)]
    return list(image.split([n for n in rows if n], dim=2))


def _joined(strips: Strips, channels: int) -> Strips:
    """One piece again, where a map of so many channels is no longer large."""
    cells = sum(x.shape[2] * x.shape[3] for x in strips)
    return strips if channels * cells >= LARGE else [torch.cat(strips, dim=2)]


def _downsample(downsample: Downsample, strips: Strips) -> Strips:
    """Every strip on its own, with the row below it; strips have an even number of rows."""
    if len(strips) == 1:
        return [downsample(strips[0])]
    shrunk = []
    for i, strip in enumerate(strips):
        x = torch.cat([strip, *(x[:, :, :1] for x in strips[i + 1 : i + 2])], dim=2)
        x = F.pad(x, (0, 1, 0, int(i == len(strips) - 1)))
        shrunk.append(downsample.conv(x))
    return shrunk


def _cut(strips: Strips, channels: int, factor: int) -> Strips:
    """Cut a map if what is made of it has this many channels, ``factor`` times the sides and is large."""
    height, width = strips[0].shape[2:]
    if len(strips) > 1 or channels * height * width * factor**2 < LARGE:
        return strips
    return list(strips[0].tensor_split(STRIPS, dim=2))


def _upsample(upsample: Upsample, strips: Strips) -> Strips:
    """Every strip on its own, with a neighbouring row of each side that is cut off again."""
    grown = []
    for i, strip in enumerate(strips):
        x = upsample(_with_neighbours(strips, i))
        first = 2 if i else 0
        grown.append(x[:, :, first : first + 2 * strip.shape[2]])
    return grown


def _residual_block(block: ResnetBlock, strips: Strips) -> Strips:
    if len(strips) == 1:
        return [block(strips[0])]
    h = _norm_silu_convolve(block.norm1, block.conv1, strips)
    h = _norm_silu_convolve(block.norm2, block.conv2, h)
    return [block.nin_shortcut(x) + y for x, y in zip(strips, h, strict=True)]


def _norm_silu_convolve(norm: GroupNorm, conv: nn.Conv2d, strips: Strips) -> Strips:
    """GroupNorm in float32, SiLU and a 3 x 3 convolution."""
    if len(strips) == 1:
        return [conv(F.silu(norm(strips[0])))]
    mean, gain = _statistics(norm, strips)
    bias = norm.bias[:, None, None]
    convolved = []
    for i in range(len(strips)):
        x = _with_neighbours(strips, i)
        x = F.silu(((x.float() - mean) * gain + bias).to(x.dtype))
        convolved.append(_convolve(conv, x, strips, i))
    return convolved


def _convolve(conv: nn.Conv2d, x: Tensor, strips: Strips, i: int) -> Tensor:
    """Of a strip with its neighbouring rows, 3 x 3; zeros are around the whole map only."""
    x = F.pad(x, (0, 0, int(i == 0), int(i == len(strips) - 1)))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))


def _with_neighbours(strips: Strips, i: int) -> Tensor:
    """A strip with the rows just above and below it, where there are any."""
    above, below = strips[i - 1 : i] if i else [], strips[i + 1 : i + 2]
    rows = [*(x[:, :, -1:] for x in above), strips[i], *(x[:, :, :1] for x in below)]
    return torch.cat(rows, dim=2) if len(rows) > 1 else rows[0]


def _statistics(norm: GroupNorm, strips: Strips) -> tuple[Tensor, Tensor]:
    """Mean and gain of every channel, (B, C, 1, 1) in float32, from each strip's mean and variance.

    These two are one tensor, so that whoever computes them is done with a strip before the next: ONNX Runtime
    goes from results back to what they need, and would have all strips in float32 at once otherwise.
    """
    found = []
    for x in strips:
        cells = x.float().unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, cells)
        mean = cells.mean(2, keepdim=True)
        found.append(torch.cat((mean, (cells - mean).square().mean(2, keepdim=True)), dim=2))
    rows = torch.tensor([x.shape[2] for x in strips], dtype=torch.float32)
    share = rows / rows.sum()
    mean_of_strip, variance_in_strip = torch.stack(found, dim=3).unbind(2)  # (B, groups, strips) each
    mean = (mean_of_strip * share).sum(2, keepdim=True)
    variance = ((variance_in_strip + (mean_of_strip - mean).square()) * share).sum(2, keepdim=True)
    gain = (variance + norm.eps).rsqrt()
    width = norm.num_channels // norm.num_groups
    mean, gain = (s.repeat_interleave(width, dim=1)[..., None] for s in (mean, gain))
    return mean, gain * norm.weight[:, None, None]
