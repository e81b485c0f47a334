"""MAR's image tokenizer, KL-16: pixels <-> a continuous latent near a normal distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hart_runtime.common.mar_config import KlConfig
from hart_runtime.hart.autoencoder import Decoder, Encoder, SplitAttnBlock

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of the logarithm of a latent's variance, in the published code."""


class KlTokenizer(nn.Module):
    """Encoder and decoder of ``kl16.ckpt``."""

    def __init__(self, config: KlConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.z_channels
        self.encoder = Encoder(config.ch, config.ch_mult, 2 * channels, SplitAttnBlock)
        self.decoder = Decoder(config.ch, config.ch_mult, channels, SplitAttnBlock, middle_only=True)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] to mean and log variance of their latent. (B, 3, H, W) -> (B, Cv, h, w) each"""
        mean, log_variance = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent to pixels, unclamped. (B, Cv, h, w) -> (B, 3, H, W)"""
        latent = latent.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latent)).float()

    def shown(self, pixels: Tensor) -> Tensor:
        """Unclamped pixels to [0, 1] and half a byte more, whose whole part is what published code rounds."""
        return (pixels.clamp(-1, 1) + 1) / 2 + 0.5 / 255

    def decode_tokens(self, tokens: Tensor, patch: int) -> Tensor:
        """Tokens of a picture to its pixels, unclamped. (B, L, D) -> (B, 3, H, W)"""
        return self.decode(unpatchify(tokens, patch) / self.config.latent_scale)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Tokens, row after row, to the map of their cells. (B, L, Cv * p * p) -> (B, Cv, s * p, s * p)"""
    side = round(tokens.shape[1] ** 0.5)
    cells = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (side, side))  # rows, columns, Cv, p, p
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patchify(latent: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`unpatchify`."""
    cells = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B, Cv, rows, p, columns, p
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixels(images: Tensor) -> Tensor:
    """What the published code writes of unclamped pixels: rounded to the even. -> (B, H, W, 3) uint8"""
    scaled = (255 * ((images + 1) / 2)).clamp(0, 255)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1)
