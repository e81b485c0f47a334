"""Sizes of networks that formulas of operations and bytes are made of, from their configurations."""

from __future__ import annotations

from hart_runtime.common.config import (
    ClassHartConfig,
    TextEncoderConfig,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
)

DECODER_BLOCKS = 3
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
    """Matrix elements of the diffusion MLP that a denoising step uses."""
    width = llm.diff_width
    block = 5 * width * width  # two layers and three modulations
    ends = channels * width + 2 * width * width + 2 * channels * width
    return {"residual_weights": llm.diff_depth * block + ends}


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
    """Of decoding one latent of ``side`` x ``side`` cells, of the convolution after each scale, and channels
    of the decoder where its maps are largest.
    """
    operations, weights = decoder_counts(image, side)
    phi = 9 * image.z_channels if image.num_phi else 0
    return {
        "decoder_operations": operations,
        "decoder_weights": weights,
        "decoder_width": image.ch * image.ch_mult[0],
        "phi": phi,
    }


def decoder_counts(image: TokenizerConfig, side: int) -> tuple[int, int]:
    """Operations of decoding one latent of ``side`` x ``side`` cells, and weights for it."""
    operations = weights = 0

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        nonlocal operations, weights
        elements = inputs * outputs * kernel * kernel
        operations += 2 * elements * side * side
        weights += elements

    def residual_block(inputs: int, outputs: int) -> None:
        convolution(inputs, outputs, 3)
        convolution(outputs, outputs, 3)
        if inputs != outputs:
            convolution(inputs, outputs, 1)

    def attention(channels: int) -> None:
        nonlocal operations
        convolution(channels, 4 * channels, 1)  # q, k, v and the projection out
        operations += 4 * side**4 * channels

    widths = [image.ch * factor for factor in image.ch_mult]
    width = widths[-1]
    convolution(image.z_channels, image.z_channels, image.quant_conv_ks)
    convolution(image.z_channels, width, 3)
    residual_block(width, width)
    attention(width)
    residual_block(width, width)
    for level in reversed(range(len(widths))):
        for _ in range(DECODER_BLOCKS):
            residual_block(width, widths[level])
            width = widths[level]
            if level == len(widths) - 1:
                attention(width)
        if level:
            side *= 2
            convolution(width, width, 3)
    convolution(width, 3, 3)
    return operations, weights
