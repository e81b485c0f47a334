"""Reads the two files of a VAR checkpoint, ``var_d16.pth`` to ``var_d36.pth`` and ``vae_ch160v4096z32.pth``.

There is no configuration beside them: every size is read from the shapes of tensors, whatever the
file's name says.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from hart_runtime.common.checkpoint import LLM
from hart_runtime.common.checkpoint import TOKENIZER as TOKENIZER_PART
from hart_runtime.common.config import DISCRETE, ClassTransformerConfig, TokenizerConfig
from hart_runtime.common.errors import InputError, shown, told_of
from hart_runtime.common.weight_files import WeightFiles
from hart_runtime.hart.checkpoint import UNUSED_LLM, UNUSED_TOKENIZER, Table, fill
from hart_runtime.hart.class_transformer import ClassTransformer
from hart_runtime.hart.model import Var
from hart_runtime.hart.stored_sizes import Shapes, count_of, named_below
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.weights import Stored, opened

HEAD = 64
"""Width of a head in every published model; files without l2-normalised attention do not tell it."""
HEADS, SHARED = "blocks.0.attn.scale_mul_1H11", "shared_ada_lin.1.weight"
TRANSFORMER, TOKENIZER = "pos_1LC", "quantize.embedding.weight"
"""A name that only files of the one, or of the other have."""


def load_var(
    transformer: Path,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    num_heads: int | None = None,
) -> Var:
    """Load a class-conditional transformer and its image tokenizer.

    Args:
        transformer, tokenizer: their files, ``.pth`` or safetensors.
        dtype: precision of the matrix products; norms and the codebook stay float32.
        num_heads: of a transformer whose file does not tell, if its heads are not 64 wide.

    Raises:
        InputError: a file is broken or another network's, or keys are missing, unexpected or of another
            shape; in one sentence.
    """
    model = empty_var(transformer, tokenizer, num_heads)
    _fill_tokenizer(model, tokenizer, dtype)
    _fill_transformer(model, transformer, dtype)
    return Var(model.transformer.eval(), model.tokenizer.eval())


def var_checks(
    transformer: Path, tokenizer: Path, num_heads: int | None = None
) -> dict[str, Callable[[], None]]:
    """By network, what compares names, shapes and types in its file with it; no values are read.

    Raises:
        InputError: as :func:`load_var`.
    """
    model = empty_var(transformer, tokenizer, num_heads)
    return {
        TOKENIZER_PART: functools.partial(_fill_tokenizer, model, tokenizer, None),
        LLM: functools.partial(_fill_transformer, model, transformer, None),
    }


def _fill_tokenizer(model: Var, file: Path, dtype: torch.dtype | None) -> None:
    hits = {"ema_vocab_hit_SV": _table("codes", None, model.tokenizer.config.vocab_size)}
    fill(model.tokenizer, WeightFiles((file,)), dtype, [UNUSED_TOKENIZER], hits)


def _fill_transformer(model: Var, file: Path, dtype: torch.dtype | None) -> None:
    tokens = sum(side * side for side in model.transformer.config.patch_nums)
    mask = {"attn_bias_for_masking": _table("tokens", 1, 1, tokens, tokens)}
    fill(model.transformer, WeightFiles((file,)), dtype, [UNUSED_LLM], mask, stored=stored_name)


def empty_var(transformer: Path, tokenizer: Path, num_heads: int | None = None) -> Var:
    """Both networks as the shapes in their files describe them, on the meta device: without numbers."""
    config, width = _transformer_config(transformer, num_heads)
    image = _tokenizer_config(tokenizer, config.patch_nums)
    if width != image.z_channels:
        raise InputError(
            f"{transformer}: takes latents of {width} channels, {tokenizer} has {image.z_channels}"
        )
    with torch.device("meta"):
        networks = ClassTransformer(config, image.vocab_size, image.z_channels), ImageTokenizer(image)
    return Var(*networks)


def stored_name(name: str) -> str:
    """What the published code calls a parameter."""
    return name.replace(".qkv_proj.", ".mat_qkv.")


def _table(what: str, *shape: int | None) -> Table:
    """Refuses a stored table of another shape; None is any number."""

    def check(entry: Stored) -> None:
        if len(entry.shape) != len(shape) or any(
            wanted not in (None, found) for found, wanted in zip(entry.shape, shape, strict=True)
        ):
            raise InputError(f"{entry}: is {entry.shape}, but the other tensors are for {shape[-1]} {what}")

    return check


def _transformer_config(file: Path, num_heads: int | None) -> tuple[ClassTransformerConfig, int]:
    """Of a transformer, and the channels of the latents it takes."""
    with opened(WeightFiles((file,))) as entries:
        found = named_below(entries, TRANSFORMER, file, "a VAR transformer")
        shapes = {name: entry.shape for name, entry in found.items()}
        sizes = Shapes(file, shapes)
        classes, dim = sizes.of("class_emb.weight", 2)
        normalised = HEADS in shapes
        heads = sizes.of(HEADS, 4)[1] if normalised else num_heads or max(dim // HEAD, 1)
        levels = found.get("lvl_1L")
        if levels is None:
            raise InputError(f"{file}: expected lvl_1L, which holds the scales, found none")
        sides, hidden = _sides(levels), sizes.of("blocks.0.ffn.fc1.weight", 2)[0]
        with told_of(str(file)):
            config = ClassTransformerConfig(
                depth=count_of(shapes, r"blocks\."),
                embed_dim=dim,
                num_heads=heads,
                num_classes=classes - 1,
                patch_nums=sides,
                mlp_hidden=hidden,
                attn_l2_norm=normalised,
                shared_aln=SHARED in shapes,
            )
        return config, sizes.of("word_embed.weight", 2)[1]


def _tokenizer_config(file: Path, patch_nums: tuple[int, ...]) -> TokenizerConfig:
    with opened(WeightFiles((file,))) as entries:
        found = named_below(entries, TOKENIZER, file, "VAR's image tokenizer")
        shapes = {name: entry.shape for name, entry in found.items()}
    sizes = Shapes(file, shapes)
    vocabulary, channels = sizes.of(TOKENIZER, 2)
    width = sizes.of("encoder.conv_in.weight", 4)[0]
    levels = range(count_of(shapes, r"encoder\.down\."))
    widths = [sizes.of(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    shared, own = (
        count_of(shapes, rf"quantize\.quant_resi\.{part}", "weight") for part in ("qresi_ls\\.", "")
    )
    single = "quantize.quant_resi.qresi.weight" in shapes
    kernel = sizes.of("quant_conv.weight", 4)[-1]
    with told_of(str(file)):
        return TokenizerConfig(
            vocab_size=vocabulary,
            z_channels=channels,
            ch=width,
            ch_mult=tuple(w // width for w in widths),
            quant_conv_ks=kernel,
            quant_resi=TokenizerConfig.quant_resi if shared or own or single else 0.0,
            share_quant_resi=shared or int(single),
            default_qresi_counts=own,
            v_patch_nums=patch_nums,
            quantizer_type=DISCRETE,
        )


def _sides(levels: Stored) -> tuple[int, ...]:
    """The scales, of the level of every token, in order."""
    if not levels.readable:
        raise InputError(f"{levels}: expected numbers, found {levels.kind}")
    stored = levels.read().flatten().tolist()
    found = list(Counter(stored).items())
    sides = tuple(math.isqrt(tokens) for _, tokens in found)
    if stored != [level for level, side in enumerate(sides) for _ in range(side * side)]:
        raise InputError(
            f"{levels}: expected square numbers of tokens at levels 0, 1, ..., found {shown(dict(found))}"
        )
    return sides
