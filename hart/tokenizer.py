"""The image tokenizer: pixels <-> hybrid tokens."""

from __future__ import annotations

from torch import Tensor, nn

from hart_runtime.common.config import TokenizerConfig
from hart_runtime.hart.autoencoder import Decoder, Encoder
from hart_runtime.hart.quantizer import HybridQuantizer, HybridTokens


class ImageTokenizer(nn.Module):
    """Encoder, multi-scale hybrid quantizer and decoder (the ``vae.`` part of a checkpoint)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        pad = config.quant_conv_ks // 2
        channels = config.z_channels
        self.encoder = Encoder(config.ch, config.ch_mult, channels)
        self.decoder = Decoder(config.ch, config.ch_mult, channels)
        self.quant_conv = nn.Conv2d(channels, channels, config.quant_conv_ks, padding=pad)
        self.post_quant_conv = nn.Conv2d(channels, channels, config.quant_conv_ks, padding=pad)
        self.quantize = HybridQuantizer(config)

    def latent(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1], (B, 3, H, W), to the continuous latent f (B, Cv, P, P)."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> HybridTokens:
        """Pixels in [-1, 1] to indices per scale and the continuous rest of the last one."""
        return self.quantize.encode(self.latent(images), self.config.v_patch_nums)

    def decode(self, f_hat: Tensor) -> Tensor:
        """Latent (B, Cv, P, P) to pixels clamped to [-1, 1], (B, 3, H, W)."""
        return self.decode_unclamped(f_hat).clamp(-1, 1)

    def shown(self, pixels: Tensor) -> Tensor:
        """Unclamped pixels to [0, 1], of which bytes are the whole part, as in the published sampler."""
        return (pixels.clamp(-1, 1) + 1) / 2

    def decode_unclamped(self, f_hat: Tensor) -> Tensor:
        f_hat = f_hat.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(f_hat)).float()

    def decode_discrete(self, tokens: HybridTokens) -> Tensor:
        """Pixels from the index maps alone."""
        return self.decode(self.quantize.accumulate(tokens.indices, self.config.v_patch_nums)[-1])

    def decode_continuous(self, tokens: HybridTokens) -> Tensor:
        """Pixels from the index maps of all scales but the last and the continuous rest."""
        f_hats = self.quantize.accumulate(tokens.indices, self.config.v_patch_nums)
        return self.decode(f_hats[-2] + tokens.rest)
