"""Reads the two files of a MAR checkpoint, ``mar_base/checkpoint-last.pth`` and ``kl16.ckpt``.

There is no configuration beside them: every size is read from the shapes of tensors but for the number of
heads, which no tensor tells; published ones have those of :data:`HEADS`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from hart_runtime.common.checkpoint import LLM
from hart_runtime.common.checkpoint import TOKENIZER as TOKENIZER_PART
from hart_runtime.common.errors import InputError, told_of
from hart_runtime.common.mar_config import Heads, KlConfig, MarConfig
from hart_runtime.common.weight_files import WeightFiles, choose_set
from hart_runtime.hart.checkpoint import fill
from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.mar import MarTransformer
from hart_runtime.hart.model import Mar
from hart_runtime.hart.stored_sizes import Shapes, count_of, named_below
from hart_runtime.hart.weights import opened

HEADS = {768: 12, 1024: 16, 1280: 16}
"""Of the published models, by their width."""
TRANSFORMER, TOKENIZER = "diffusion_pos_embed_learned", "decoder.mid.attn_1.q.weight"
"""A name that only files of the one, or of the other have."""
TRAINING = re.compile(r"(.*\.)?loss\..*")
"""The discriminator and the perceptual network of the tokenizer's training, where a file still has them."""


def load_mar(
    transformer: Path,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    heads: Heads | None = None,
    ema: bool | None = None,
) -> Mar:
    """Load a masked autoregressive model and its image tokenizer.

    Args:
        transformer, tokenizer: their files, pickled or safetensors.
        dtype: precision of the matrix products; norms and tables stay float32.
        heads: where they are not those of a published model of that width.
        ema: True for ``model_ema``, False for ``model``; by default the averaged ones if there are any, as
            the published code does.

    Raises:
        InputError: a file is broken or another network's, or keys are missing, unexpected or of another
            shape; in one sentence.
    """
    model = empty_mar(transformer, tokenizer, heads, ema)
    _fill_tokenizer(model, tokenizer, dtype)
    _fill_transformer(model, transformer, ema, dtype)
    return Mar(model.transformer.eval(), model.tokenizer.eval())


def mar_checks(
    transformer: Path, tokenizer: Path, heads: Heads | None = None, ema: bool | None = None
) -> dict[str, Callable[[], None]]:
    """By network, what compares names, shapes and types in its file with it; no values are read.

    Raises:
        InputError: as :func:`load_mar`.
    """
    model = empty_mar(transformer, tokenizer, heads, ema)
    return {
        TOKENIZER_PART: functools.partial(_fill_tokenizer, model, tokenizer, None),
        LLM: functools.partial(_fill_transformer, model, transformer, ema, None),
    }


def empty_mar(transformer: Path, tokenizer: Path, heads: Heads | None = None, ema: bool | None = None) -> Mar:
    """Both networks as the shapes in their files describe them, on the meta device: without numbers."""
    image = _tokenizer_config(tokenizer)
    config = _transformer_config(transformer, tokenizer, image.z_channels, heads, ema)
    with torch.device("meta"):
        return Mar(MarTransformer(config), KlTokenizer(image))


def _fill_tokenizer(model: Mar, file: Path, dtype: torch.dtype | None) -> None:
    """The published code leaves out what its network does not have; here a warning tells of that."""
    fill(model.tokenizer, WeightFiles((file,)), dtype, [TRAINING], strangers_refused=False)


def _fill_transformer(model: Mar, file: Path, ema: bool | None, dtype: torch.dtype | None) -> None:
    fill(model.transformer, WeightFiles((file,)), dtype, [], ema=ema)


def _transformer_config(
    file: Path, tokenizer: Path, channels: int, heads: Heads | None, ema: bool | None
) -> MarConfig:
    """Of a transformer, for a tokenizer with latents of so many channels."""
    with opened(WeightFiles((file,))) as entries:
        chosen = functools.partial(choose_set, file, ema=ema)
        found = named_below(entries, TRANSFORMER, file, "a MAR transformer", chosen)
        shapes = {name: entry.shape for name, entry in found.items()}
    sizes = Shapes(file, shapes)
    tokens = sizes.of(TRANSFORMER, 3)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(f"{file}: {TRANSFORMER}: expected a square number of tokens, found {tokens}")
    inside, token_channels = sizes.of("z_proj.weight", 2)
    outside = sizes.of("decoder_embed.weight", 2)[0]
    patch = math.isqrt(token_channels // channels)
    if channels * patch**2 != token_channels:
        raise InputError(
            f"{file}: has tokens of {token_channels} channels, which are no square of cells of {tokenizer}, "
            f"whose latents have {channels}"
        )
    encoder_heads, decoder_heads = heads or (_heads(file, inside), _heads(file, outside))
    with told_of(str(file)):
        return MarConfig(
            num_classes=sizes.of("class_emb.weight", 2)[0],
            side=side,
            patch=patch,
            token_channels=token_channels,
            buffer=sizes.of("encoder_pos_embed_learned", 3)[1] - tokens,
            encoder_dim=inside,
            encoder_depth=count_of(shapes, r"encoder_blocks\."),
            encoder_heads=encoder_heads,
            encoder_hidden=sizes.of("encoder_blocks.0.mlp.fc1.weight", 2)[0],
            decoder_dim=outside,
            decoder_depth=count_of(shapes, r"decoder_blocks\."),
            decoder_heads=decoder_heads,
            decoder_hidden=sizes.of("decoder_blocks.0.mlp.fc1.weight", 2)[0],
            diff_width=sizes.of("diffloss.net.input_proj.weight", 2)[0],
            diff_depth=count_of(shapes, r"diffloss\.net\.res_blocks\."),
        )


def _heads(file: Path, width: int) -> int:
    if width not in HEADS:
        known = ", ".join(f"{dim} ({heads})" for dim, heads in HEADS.items())
        raise InputError(
            f"{file}: is {width} wide, and no tensor says how many heads that is; widths with a known number "
            f"are {known}; give `heads`"
        )
    return HEADS[width]


def _tokenizer_config(file: Path) -> KlConfig:
    with opened(WeightFiles((file,))) as entries:
        found = named_below(entries, TOKENIZER, file, "MAR's image tokenizer")
        shapes = {name: entry.shape for name, entry in found.items()}
    sizes = Shapes(file, shapes)
    width = sizes.of("encoder.conv_in.weight", 4)[0]
    levels = range(count_of(shapes, r"encoder\.down\."))
    widths = [sizes.of(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    with told_of(str(file)):
        return KlConfig(
            ch=width,
            ch_mult=tuple(w // width for w in widths),
            z_channels=sizes.of("post_quant_conv.weight", 4)[0],
        )
