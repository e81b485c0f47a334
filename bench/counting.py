"""Operations and bytes of each stage, counted from the model configuration.

Counted is what a picture needs, not what a graph does: matrix products, convolutions and
attention (a multiply-add is two operations) for both guidance halves, and the bytes that have to
move if everything inside a stage stays in fast memory: its weights, its inputs (KV cache and
random numbers among them) and its outputs.

Some work is needed less often than a plain loop does it, and is counted that often: the
unconditional half of the text context does not depend on the prompt, the vocabulary projection
is affine, so guidance can come before it, and embeddings of levels and timesteps are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from hart_runtime.common.checkpoint import LLM, TEXT_ENCODER, TOKENIZER
from hart_runtime.common.config import TextEncoderConfig, TokenizerConfig, TransformerConfig, config_from_dict
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.runtime import stages
from hart_runtime.runtime.bundle import Manifest

FLOAT = 4
"""Bytes of everything that passes between graphs: float32 at any precision."""
DECODER_BLOCKS = 3
"""Residual blocks per resolution (:mod:`hart_runtime.hart.autoencoder` has them too, but needs torch)."""


@dataclass(frozen=True)
class Work:
    """What a stage has to do."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def count(manifest: Manifest, batch: int) -> dict[str, Work]:
    """Work of every stage of a batch of pictures, with the bundle's sampling settings.

    The text encoder is left out when the manifest does not say how large it is.
    """
    llm = config_from_dict(TransformerConfig, manifest.checkpoint[LLM], "manifest")
    image = config_from_dict(TokenizerConfig, manifest.checkpoint[TOKENIZER], "manifest")
    weight = manifest.kind.weight_bytes
    cached = unchanged = manifest.kind.traced_bytes  # the latter: graphs without products in int8
    patch_nums, tokens, dim = manifest.model.patch_nums, llm.context_token, llm.embed_dim
    channels, last = image.z_channels, patch_nums[-1]
    both, latent = 2 * batch, batch * last**2 * channels * FLOAT
    work: dict[str, Work] = {}

    if manifest.checkpoint.get(TEXT_ENCODER):
        text = config_from_dict(TextEncoderConfig, manifest.checkpoint[TEXT_ENCODER], "manifest")
        read = (text_encoder_weights(text) + batch * tokens * text.hidden_size) * unchanged
        features = batch * tokens * text.hidden_size * FLOAT
        work[stages.TEXT_ENCODER] = Work(text_encoder_operations(text, batch, tokens), read + features)

    projection = _product(batch * tokens, llm.context_dim, dim, weight)
    head_norm = _product(both, dim, 2 * dim, weight)  # its condition is the same at every scale
    work[stages.CONTEXT] = projection + head_norm

    past = 0
    for scale, side in enumerate(patch_nums):
        new = side**2 if scale else tokens
        rows = both if scale else batch
        cache = 2 * llm.depth * dim * cached * rows * (past + new)  # keys and values
        residual_stream = 2 * rows * new * dim * FLOAT
        moved = block_weights(llm) * llm.depth * weight + cache + residual_stream
        operations = transformer_operations(llm, rows, new, past)
        work[stages.TRANSFORMER.format(index=scale)] = Work(operations, moved)
        past += new
        work[stages.SAMPLING.format(index=scale)] = _sampling(manifest, image, dim, batch, scale)

    cells = last**2
    if manifest.sampling.residual:
        width = llm.diff_width
        embedded = _product(batch * cells, channels, dim, weight)
        condition = _product(both * cells, dim, width, weight)
        work[stages.RESIDUAL_CONDITION] = embedded + condition
        step = Work(
            residual_operations(llm, channels, both * cells),
            residual_weights(llm, channels) * weight + both * cells * width * FLOAT + 3 * latent,
        )
        for number in range(len(diffusion_schedule(manifest.sampling.steps))):
            work[stages.RESIDUAL_STEP.format(index=number)] = step
    pixels = batch * 3 * manifest.model.image_size**2 * FLOAT
    operations, parameters = decoder_counts(image, last)
    work[stages.DECODER] = Work(batch * operations, parameters * unchanged + 2 * latent + pixels)
    return work


def block_weights(llm: TransformerConfig) -> int:
    """Matrix elements of one transformer block."""
    dim, hidden = llm.embed_dim, llm.mlp_hidden
    mlp = (3 if llm.mlp_type == "llama" else 2) * dim * hidden
    modulation = 0 if llm.disable_aln else 6 * dim * dim
    return 4 * dim * dim + mlp + modulation


def transformer_operations(llm: TransformerConfig, rows: int, new: int, past: int) -> int:
    """All blocks for ``new`` tokens after ``past`` cached ones, in ``rows`` batch rows."""
    dim = llm.embed_dim
    modulation = 0 if llm.disable_aln else 6 * dim * dim  # once per row, not per token
    per_token = block_weights(llm) - modulation
    attention = 4 * new * (past + new) * dim  # q k^T and the weighted sum of v
    return llm.depth * rows * (2 * new * per_token + attention + 2 * modulation)


def residual_weights(llm: TransformerConfig, channels: int) -> int:
    """Matrix elements of the diffusion MLP that a denoising step uses."""
    width = llm.diff_width
    block = 5 * width * width  # two layers and three modulations
    return channels * width + llm.diff_depth * block + 2 * width * width + 2 * channels * width


def residual_operations(llm: TransformerConfig, channels: int, tokens: int) -> int:
    """One denoising step for ``tokens`` tokens, both guidance halves counted."""
    return 2 * tokens * residual_weights(llm, channels)


def text_encoder_weights(text: TextEncoderConfig) -> int:
    """Matrix elements of all layers, without the embedding table."""
    dim = text.hidden_size
    keys = text.num_key_value_heads * text.head_dim
    return text.num_hidden_layers * (2 * dim * dim + 2 * dim * keys + 3 * dim * text.intermediate_size)


def text_encoder_operations(text: TextEncoderConfig, batch: int, tokens: int) -> int:
    attention = 4 * tokens * tokens * text.hidden_size * text.num_hidden_layers
    return batch * (2 * tokens * text_encoder_weights(text) + attention)


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


def _sampling(manifest: Manifest, image: TokenizerConfig, dim: int, batch: int, scale: int) -> Work:
    """Hidden states of one scale to the transformer's input for the next."""
    weight = manifest.kind.weight_bytes
    patch_nums, vocab, channels = manifest.model.patch_nums, image.vocab_size, image.z_channels
    side, size = patch_nums[scale], patch_nums[-1]
    tokens = batch * side**2
    codebook = vocab * channels * FLOAT
    projection = _product(tokens, dim, vocab, weight)
    hidden = 2 * tokens * dim * FLOAT
    # The projection stays inside the stage: its logits are nobody else's.
    work = Work(projection.operations, dim * vocab * weight + hidden + codebook)
    if manifest.sampling.smooth:
        work += Work(2 * tokens * vocab * channels, tokens * vocab * FLOAT)  # Gumbel noise
    for side_after in patch_nums[scale + 1 : scale + 2]:  # none after the last
        up = side * side * size + side * size * size
        down = size * size * side_after + size * side_after * side_after
        phi = size * size * 9 * channels if image.num_phi else 0
        resampled = 2 * batch * channels * (up + down + phi)
        latent = 2 * batch * channels * size * size * FLOAT  # f_hat in and out
        embedded = _product(batch * side_after**2, channels, dim, weight)
        work += Work(resampled, latent) + embedded
    return work


def _product(rows: int, inputs: int, outputs: int, weight: int) -> Work:
    """A matrix product that reads its input and writes its output as float32."""
    moved = inputs * outputs * weight + rows * (inputs + outputs) * FLOAT
    return Work(2 * rows * inputs * outputs, moved)
