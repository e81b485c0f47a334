"""Sizes of networks that formulas of operations and bytes are made of, from their configurations."""

from __future__ import annotations

from hart_runtime.common.config import (
    ClassHartConfig,
    TextEncoderConfig,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
)
from hart_runtime.common.mar_config import KlConfig

ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
"""Residual blocks per resolution (:mod:`hart_runtime.hart.autoencoder` has them too, but needs torch)."""


def block_sizes(llm: Transformer) -> dict[str, int]:
    """Blocks, heads, and matrix elements of a block that run once a token (``token_weights``)."""
    dim = llm.embed_dim
    return {
        "depth": llm.depth,
        "heads": llm.num_heads,
        "token_weights": 4 * dim * dim + llm.mlp_matrices * dim * llm.mlp_hidden,
    }


def residual_sizes(llm: TransformerConfig | ClassHartConfig, channels: int) -> dict[str, int]:
    """Of the diffusion MLP."""
    return {"residual_weights": diffusion_weights(llm.diff_width, llm.diff_depth, channels)}


def diffusion_weights(width: int, depth: int, channels: int) -> int:
    """Matrix elements of a diffusion MLP that a denoising step uses."""
    block = 5 * width * width  # two layers and three modulations
    ends = channels * width + 2 * width * width + 2 * channels * width
    return depth * block + ends


def text_encoder_sizes(text: TextEncoderConfig) -> dict[str, int]:
    """Heads, matrix elements of all layers and of the embedding table, width of all layers' attention."""
    dim = text.hidden_size
    keys = text.num_key_value_heads * text.head_dim
    layer = 2 * dim * dim + 2 * dim * keys + 3 * dim * text.intermediate_size
    return {
        "text_weights": text.num_hidden_layers * layer,
        "text_heads": text.num_attention_heads,
        "text_table": text.vocab_size * dim,
        "text_width": text.num_hidden_layers * dim,
    }


def tokenizer_sizes(image: TokenizerConfig, side: int) -> dict[str, int]:
    """Of decoding one latent of ``side`` x ``side`` cells, of encoding one, of the convolution after each
    scale, and channels of the decoder where its maps are largest.
    """
    operations, weights = decoder_counts(image, side)
    encoding, filters = encoder_counts(image, side)
    phi = 9 * image.z_channels if image.num_phi else 0
    return {
        "decoder_operations": operations,
        "decoder_weights": weights,
        "decoder_width": image.ch * image.ch_mult[0],
        "encoder_operations": encoding,
        "encoder_weights": filters,
        "phi": phi,
    }


class _Layers:
    """Operations and weights of layers, added up while the sides of maps change."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.operations = self.weights = 0

    def convolution(self, inputs: int, outputs: int, kernel: int) -> None:
        elements = inputs * outputs * kernel * kernel
        self.operations += 2 * elements * self.side**2
        self.weights += elements

    def residual_block(self, inputs: int, outputs: int) -> None:
        self.convolution(inputs, outputs, 3)
        self.convolution(outputs, outputs, 3)
        if inputs != outputs:
            self.convolution(inputs, outputs, 1)

    def attention(self, channels: int) -> None:
        self.convolution(channels, 4 * channels, 1)  # q, k, v and the projection out
        self.operations += 4 * self.side**4 * channels

    def middle(self, channels: int) -> None:
        self.residual_block(channels, channels)
        self.attention(channels)
        self.residual_block(channels, channels)


def decoder_counts(image: TokenizerConfig, side: int) -> tuple[int, int]:
    """Operations of decoding one latent of ``side`` x ``side`` cells, and weights for it."""
    widths = [image.ch * factor for factor in image.ch_mult]
    return _decoding(image.z_channels, widths, image.quant_conv_ks, side, attends=True)


def kl_decoder_counts(image: KlConfig, side: int) -> tuple[int, int]:
    """The same of an autoencoder that attends in the middle alone."""
    widths = [image.ch * factor for factor in image.ch_mult]
    return _decoding(image.z_channels, widths, 1, side, attends=False)


def _decoding(channels: int, widths: list[int], kernel: int, side: int, attends: bool) -> tuple[int, int]:
    """Of widths by level; ``attends``: whether the blocks of the smallest maps do, too."""
    layers = _Layers(side)
    width = widths[-1]
    layers.convolution(channels, channels, kernel)
    layers.convolution(channels, width, 3)
    layers.middle(width)
    for level in reversed(range(len(widths))):
        for _ in range(DECODER_BLOCKS):
            layers.residual_block(width, widths[level])
            width = widths[level]
            if attends and level == len(widths) - 1:
                layers.attention(width)
        if level:
            layers.side *= 2
            layers.convolution(width, width, 3)
    layers.convolution(width, 3, 3)
    return layers.operations, layers.weights


def encoder_counts(image: TokenizerConfig, side: int) -> tuple[int, int]:
    """The same of encoding one; what looks for the nearest codes is not among them."""
    layers = _Layers(side * image.downsample)
    widths = [image.ch * factor for factor in image.ch_mult]
    width = image.ch
    layers.convolution(3, width, 3)
    for level, wider in enumerate(widths):
        for _ in range(ENCODER_BLOCKS):
            layers.residual_block(width, wider)
            width = wider
            if level == len(widths) - 1:
                layers.attention(width)
        if level < len(widths) - 1:
            layers.side //= 2
            layers.convolution(width, width, 3)
    layers.middle(width)
    layers.convolution(width, image.z_channels, 3)
    layers.convolution(image.z_channels, image.z_channels, image.quant_conv_ks)
    return layers.operations, layers.weights
