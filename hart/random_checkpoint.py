"""A checkpoint of random numbers in the published layout, to measure speed at any size.

``python -m hart_runtime.hart.random_checkpoint --shape mid-256px --output DIR``. Weights have the size of
trained ones (activations keep their scale through every layer), so that no stage computes with
NaN, infinity or denormals. A random text encoder with the demo's vocabulary comes along, small or of
the size of the published one. ``--published`` writes everything that published files hold. Shapes of VAR and
MAR become their two files, of a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart_runtime.common.checkpoint import AVERAGED, LLM, SAMPLING_FILE, TEXT_ENCODER, TOKENIZER
from hart_runtime.common.config import (
    TextEncoderConfig,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import InputError, known_names, one_of, parameter, shown
from hart_runtime.common.files import whole_folder
from hart_runtime.common.install import require
from hart_runtime.common.json_files import read_json
from hart_runtime.common.precisions import FP32
from hart_runtime.hart.random_weights import (
    DTYPES,
    MASKED,
    SHAPES,
    TRANSFORMER,
    makers_of,
    shape_file,
    write_json,
    write_pickle,
    write_weights,
)

if TYPE_CHECKING:
    from torch import nn

    from hart_runtime.hart.published import Makers

Config = TransformerConfig | TokenizerConfig | TextEncoderConfig

NOT_OURS = ("B",)
"""What shape files say beside, for others: pictures drawn at once."""
SAMPLING_NAMES = {"cfg": "guidance", "top_p": "top_p", "more_smooth": "smooth"}
"""Names of sampling settings in a shape file, which are the published sampler's, and ours."""


@dataclass(frozen=True)
class ModelShape:
    """What a shape file describes."""

    llm: TransformerConfig
    tokenizer: TokenizerConfig
    sampling: dict[str, Any]


def is_var(name: str) -> bool:
    """Whether a shape is one of VAR; raises InputError where there is none."""
    return TRANSFORMER in read_json(shape_file(name))


def is_mar(name: str) -> bool:
    """The same of MAR."""
    return MASKED in read_json(shape_file(name))


def read_shape(name: str) -> ModelShape:
    """A shape that comes with the package, by name, or a shape file.

    Raises:
        InputError: no such shape, or its options cannot be used.
    """
    file = shape_file(name)
    values = read_json(file)
    for part, family in ((TRANSFORMER, "VAR"), (MASKED, "MAR")):
        if part in values:
            raise InputError(f"{parameter('shape', name)}: expected a shape of HART, found one of {family}")
    known_names(str(file), values, (LLM, TOKENIZER, *NOT_OURS, *SAMPLING_NAMES))
    for part in (LLM, TOKENIZER):
        if not isinstance(values.get(part), dict):
            raise InputError(f"{file}: expected an object {part!r}, found {shown(values.get(part))}")
    return ModelShape(
        config_from_dict(TransformerConfig, values[LLM], f"{file}: {LLM}"),
        config_from_dict(TokenizerConfig, values[TOKENIZER], f"{file}: {TOKENIZER}"),
        {ours: values[theirs] for theirs, ours in SAMPLING_NAMES.items() if theirs in values},
    )


def small_text_encoder(hidden_size: int, vocab_size: int) -> TextEncoderConfig:
    """Two layers of Qwen2, with features of the size that the transformer expects."""
    heads = hidden_size // math.gcd(hidden_size, 64)
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, 2),
        use_llm_system_prompt=False,
    )


QWEN2_1_5B = TextEncoderConfig(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
)
"""Qwen2-1.5B (arXiv 2407.10671, table 1), whose embedding table is its output layer too."""
TEXT_ENCODERS = ("small", "qwen2-1.5b")


def write_random_checkpoint(
    shape: ModelShape,
    output: Path,
    dtype: str = FP32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
    text_encoder: str = "small",
    published: bool = False,
) -> int:
    """Write a checkpoint folder that ``hart-export`` and ``load_hart`` read.

    Args:
        dtype: "fp32" or "fp16", how weights are stored.
        progress: told the number of tensors made and to be made.
        text_encoder: "small" or "qwen2-1.5b".
        published: also write averaged weights of their own, pickled as ``ema_model.bin``, and
            what :mod:`hart_runtime.hart.published` knows of.

    Returns:
        How many weights it holds.

    Raises:
        InputError: ``output`` exists or cannot be written, or the shape is impossible.
    """
    import torch
    from tokenizers import Tokenizer

    from hart_runtime.hart.demo import DEMO_CHECKPOINT
    from hart_runtime.hart.published import llm_buffers, tokenizer_extras
    from hart_runtime.hart.text_encoder import TextEncoder
    from hart_runtime.hart.tokenizer import ImageTokenizer
    from hart_runtime.hart.transformer import ScaleTransformer

    one_of("dtype", dtype, DTYPES)
    one_of("text_encoder", text_encoder, TEXT_ENCODERS)
    vocabulary = Tokenizer.from_file(str(DEMO_CHECKPOINT / TEXT_ENCODER / "tokenizer.json"))
    text = QWEN2_1_5B
    if text_encoder == "small":
        text = small_text_encoder(shape.llm.context_dim, vocabulary.get_vocab_size())
    if text.hidden_size != shape.llm.context_dim:
        raise InputError(
            f"{parameter('text_encoder', text_encoder)}: its features are {text.hidden_size} wide, "
            f"this shape's transformer expects {shape.llm.context_dim}"
        )
    with torch.device("meta"):
        vocab_size, channels = shape.tokenizer.vocab_size, shape.tokenizer.z_channels
        parts: dict[str, tuple[Config, nn.Module, str]] = {
            LLM: (shape.llm, ScaleTransformer(shape.llm, vocab_size, channels), ""),
            TOKENIZER: (shape.tokenizer, ImageTokenizer(shape.tokenizer), "vae."),
            TEXT_ENCODER: (text, TextEncoder(text), "model."),
        }
    extras: dict[str, Makers] = {}
    if published:
        extras = {LLM: llm_buffers(shape.llm), TOKENIZER: tokenizer_extras(shape.tokenizer)}
    generator = torch.Generator().manual_seed(seed)
    makers = {
        name: makers_of(model, prefix, dtype, generator) | extras.get(name, {})
        for name, (_, model, prefix) in parts.items()
    }
    total = sum(len(tensors) for tensors in makers.values()) + (len(makers[LLM]) if published else 0)
    done = 0

    def made() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with whole_folder(output) as folder:
        for name, (config, _, _) in parts.items():
            (folder / name).mkdir()
            write_weights(makers[name], folder / name, made)
            write_json(folder / name / "config.json", config_to_dict(config))
        if published:
            write_pickle(makers[LLM], folder / LLM / AVERAGED, made)
        vocabulary.save(str(folder / TEXT_ENCODER / "tokenizer.json"))
        write_json(folder / SAMPLING_FILE, shape.sampling)
    return sum(p.numel() for _, model, _ in parts.values() for p in model.parameters())


@command()
@click.option(
    "--shape",
    required=True,
    metavar="NAME|FILE",
    help=f"Shape file, or one of {', '.join(sorted(file.stem for file in SHAPES.glob('*.json')))}.",
)
@click.option("--output", required=True, type=PATH, help="Checkpoint folder to make.")
@click.option("--dtype", type=click.Choice(DTYPES), default=FP32, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--text-encoder", type=click.Choice(TEXT_ENCODERS), default="small", show_default=True)
@click.option(
    "--published",
    is_flag=True,
    help="Write all that published files hold: weights that are averaged and others, unused buffers.",
)
def main(shape: str, output: Path, dtype: str, seed: int, text_encoder: str, published: bool) -> None:
    """Make a checkpoint of random numbers in the published layout; VAR's files always hold all they do."""
    require("hart_runtime.hart.random_checkpoint", "export", "torch", "safetensors")
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing weights", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if is_mar(shape):
            from hart_runtime.hart.random_mar import read_mar_shape, write_random_mar

            count = write_random_mar(read_mar_shape(shape), output, dtype, seed, told, published)
        elif is_var(shape):
            from hart_runtime.hart.random_var import read_var_shape, write_random_var

            count = write_random_var(read_var_shape(shape), output, dtype, seed, told)
        else:
            chosen = read_shape(shape)
            count = write_random_checkpoint(chosen, output, dtype, seed, told, text_encoder, published)
    click.echo(f"{output}: {count / 1e6:.1f} M random weights, {dtype}")


if __name__ == "__main__":
    main()
