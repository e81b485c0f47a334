"""Counted operations: worked out by hand, and as torch counts them on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hart_runtime.common.config import TextEncoderConfig, TokenizerConfig, TransformerConfig
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import Pair, ScaleTransformer
from hart_runtime.runtime.families.hart import GRAPHS, NAME, describe_model
from hart_runtime.runtime.families.names import RESIDUAL_STEP, TEXT_ENCODER, TRANSFORMER
from hart_runtime.runtime.families.sizes import decoder_counts, residual_sizes, text_encoder_sizes
from hart_runtime.runtime.families.text import TEXT
from hart_runtime.runtime.manifest import Manifest, manifest_of
from hart_runtime.runtime.shapes import evaluate
from hart_runtime.runtime.work import count

PLAIN = TransformerConfig(
    attn_type="llama",
    mlp_type="llama",
    depth=2,
    embed_dim=48,
    num_heads=3,
    disable_aln=True,
    context_token=6,
    context_dim=20,
    patch_nums=(1, 2, 3),
    diff_width=24,
    diff_depth=2,
)
MODULATED = TransformerConfig(
    attn_type="llama",
    mlp_type="gpt2",
    depth=2,
    embed_dim=48,
    num_heads=3,
    context_token=6,
    context_dim=20,
    patch_nums=(1, 2, 3),
)
IMAGE = TokenizerConfig(
    vocab_size=64,
    z_channels=8,
    ch=32,
    ch_mult=(1, 1, 2),
    quant_conv_ks=1,
    quantizer_type="var_hybrid",
    v_patch_nums=(1, 2, 3),
)
ROWS, NEW, PAST = 4, 9, 11


def torch_counts(work: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()  # type: ignore[operator]
    return counter.get_total_flops()


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: Pair | None, heads: int, scale: float
) -> tuple[torch.Tensor, Pair]:
    """Attention as two matrix products, which every version of torch counts."""
    assert past is not None
    k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (((q @ k.transpose(2, 3)) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2), (k, v)


@pytest.mark.parametrize("config", [PLAIN, MODULATED])
def test_the_transformer_as_torch_counts_it(config: TransformerConfig) -> None:
    model = ScaleTransformer(config, 64, 8)
    x, angles = torch.randn(ROWS, NEW, 48), torch.randn(ROWS, NEW, 16)
    past = [(torch.randn(ROWS, PAST, 48), torch.randn(ROWS, PAST, 48)) for _ in range(config.depth)]
    found = torch_counts(lambda: model(x, angles, torch.randn(ROWS, 48), past, written_out))
    sizes = {"dim": config.embed_dim, **TEXT.sizes(config, {})}
    assert operations(TRANSFORMER, **sizes, rows=ROWS, length=NEW, past=PAST) == found


def test_the_residual_mlp_as_torch_counts_it() -> None:
    net = ScaleTransformer(PLAIN, 64, 8).diffloss.net
    tokens, steps = 30, torch.tensor([999])
    found = torch_counts(lambda: net(torch.randn(tokens, 8), steps, torch.randn(tokens, 24)))
    timestep = torch_counts(lambda: net.time_embed(steps))
    sizes = residual_sizes(PLAIN, 8)
    assert operations(RESIDUAL_STEP, **sizes, guided=2, cells=tokens) == 2 * (found - timestep)  # both halves


def test_the_decoder_as_torch_counts_it() -> None:
    model = ImageTokenizer(IMAGE)
    counted, weights = decoder_counts(IMAGE, 6)
    assert counted == torch_counts(lambda: model.decode(torch.randn(1, 8, 6, 6)))
    parts = (*model.decoder.named_parameters(), *model.post_quant_conv.named_parameters())
    assert weights == sum(p.numel() for _, p in parts if p.ndim == 4)


def test_the_text_encoder_as_torch_counts_it() -> None:
    config = TextEncoderConfig(50, 32, 40, 2, 4, 2)
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.bool)
    found = torch_counts(lambda: TextEncoder(config)(ids, mask))
    assert operations(TEXT_ENCODER, **text_encoder_sizes(config), batch=3, tokens=7) == found


def operations(graph: str, **sizes: int) -> int:
    return evaluate(GRAPHS[graph].operations, sizes)


def manifest(precision: str, smooth: bool) -> Manifest:
    checkpoint = {"llm": vars(PLAIN), "tokenizer": vars(IMAGE)}
    model = describe_model(PLAIN, IMAGE, (1, 2, 3))
    settings = SamplingSettings(smooth=smooth, steps="3")
    return replace(manifest_of(NAME, model, precision, sampling=settings), checkpoint=checkpoint)


def test_a_whole_picture_by_hand() -> None:
    work = count(manifest("fp32", smooth=False), batch=1)
    names = ["context", *(f"scale {k} {part}" for k in range(3) for part in ("transformer", "sampling"))]
    names += ["residual condition", *(f"residual step {i}" for i in range(3)), "decoder"]
    assert list(work) == names

    # 48 wide: qkv and output 4 * 48 * 48, gate, up and down 3 * 48 * 256, twice.
    weights = 2 * (4 * 48 * 48 + 3 * 48 * 256)
    scale2 = work["scale 2 transformer"]
    # 9 new tokens after 6 + 4, both halves; scores and weighted sums of 19 keys.
    assert scale2.operations == 2 * 9 * 2 * weights + 2 * 2 * (4 * 9 * 19 * 48)
    # Weights; keys and values of 19 tokens in two layers and two halves; 9 tokens in and out.
    assert scale2.bytes == 4 * (weights + 2 * 2 * 2 * 19 * 48 + 2 * 2 * 9 * 48)
    # The text's unconditional half is a constant: one row of 6 tokens.
    assert work["scale 0 transformer"].operations == 2 * 6 * weights + 2 * (4 * 6 * 6 * 48)
    # Last scale: only the vocabulary projection of 9 tokens, guidance applied before it.
    assert work["scale 2 sampling"].operations == 2 * 9 * 48 * 64
    assert work["scale 2 sampling"].bytes == 4 * (48 * 64 + 2 * 9 * 48 + 64 * 8)
    # Scale 1 also upsamples 2 -> 3, convolves 3 x 3, shrinks 3 -> 3 and embeds 9 cells.
    resampled = 2 * 8 * (2 * 2 * 3 + 2 * 3 * 3 + 3 * 3 * 3 + 3 * 3 * 3) + 2 * 9 * 9 * 8 * 8
    assert work["scale 1 sampling"].operations == 2 * 4 * 48 * 64 + resampled + 2 * 9 * 8 * 48


def test_smooth_sampling_reads_the_noise_and_mixes_the_codebook() -> None:
    plain, smooth = (count(manifest("fp32", smooth=s), 2)["scale 2 sampling"] for s in (False, True))
    assert smooth.operations - plain.operations == 2 * (2 * 9) * 64 * 8
    assert smooth.bytes - plain.bytes == 4 * 2 * (64 + 64 * 9) + 8 * (2 * 9)  # a pool, and where to begin


def test_half_precision_halves_weights_and_cache_but_not_operations() -> None:
    full, half = (
        count(manifest(precision, smooth=False), 1)["scale 1 transformer"] for precision in ("fp32", "fp16")
    )
    assert half.operations == full.operations
    stream = 4 * 2 * 2 * 4 * 48
    assert 2 * (half.bytes - stream) == full.bytes - stream
