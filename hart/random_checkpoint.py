"""A checkpoint of random numbers in the published layout, to measure speed at any size.

``python -m hart.random_checkpoint --shape mid-256px --output DIR``. Weights have the size of
trained ones (activations keep their scale through every layer), so that no stage computes with
NaN, infinity or denormals. A small random text encoder with the demo's vocabulary comes along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hart.config import (
    TextEncoderConfig,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
    read_json,
)
from hart.console import ends_with_a_sentence
from hart.errors import InputError
from hart.files import whole_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

Config = TransformerConfig | TokenizerConfig | TextEncoderConfig

SHAPES = Path(__file__).parent / "shapes"
DTYPES = ("fp32", "fp16")
SHARD_BYTES = 1 << 29
"""Tensors are made and written in shards of about this size, so a large model fits in memory."""
SAMPLING_NAMES = {"cfg": "guidance", "top_p": "top_p", "more_smooth": "smooth"}
"""Names of sampling settings in a shape file, which are the published sampler's, and ours."""


@dataclass(frozen=True)
class ModelShape:
    """What a shape file describes."""

    llm: TransformerConfig
    tokenizer: TokenizerConfig
    sampling: dict[str, Any]


def read_shape(name: str) -> ModelShape:
    """A shape that comes with the package, by name, or a shape file.

    Raises:
        InputError: no such shape, or its options cannot be used.
    """
    packaged = {file.stem: file for file in SHAPES.glob("*.json")}
    file = packaged.get(name, Path(name))
    if not file.is_file():
        raise InputError(
            f"--shape {name}: expected {' or '.join(sorted(packaged))}, or a file; found neither"
        )
    values = read_json(file)
    for part in ("llm", "tokenizer"):
        if not isinstance(values.get(part), dict):
            raise InputError(f"{file}: expected an object {part!r}, found {values.get(part)!r}")
    return ModelShape(
        config_from_dict(TransformerConfig, values["llm"], f"{file}: llm"),
        config_from_dict(TokenizerConfig, values["tokenizer"], f"{file}: tokenizer"),
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


def write_random_checkpoint(
    shape: ModelShape,
    output: Path,
    dtype: str = "fp32",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Write a checkpoint folder that ``hart-export`` and ``load_hart`` read.

    Args:
        dtype: "fp32" or "fp16", how weights are stored.
        progress: told the number of weights written and to be written.

    Returns:
        How many weights it holds.

    Raises:
        InputError: ``output`` exists or cannot be written, or the shape is impossible.
    """
    import torch
    from tokenizers import Tokenizer

    from hart.checkpoint import SAMPLING_FILE, TEXT_ENCODER_FOLDER
    from hart.demo import DEMO_CHECKPOINT
    from hart.text_encoder import TextEncoder
    from hart.tokenizer import ImageTokenizer
    from hart.transformer import ScaleTransformer

    vocabulary = Tokenizer.from_file(str(DEMO_CHECKPOINT / TEXT_ENCODER_FOLDER / "tokenizer.json"))
    text = small_text_encoder(shape.llm.context_dim, vocabulary.get_vocab_size())
    with torch.device("meta"):
        vocab_size, channels = shape.tokenizer.vocab_size, shape.tokenizer.z_channels
        parts: dict[str, tuple[Config, nn.Module]] = {
            "llm": (shape.llm, ScaleTransformer(shape.llm, vocab_size, channels)),
            "tokenizer": (shape.tokenizer, ImageTokenizer(shape.tokenizer)),
            TEXT_ENCODER_FOLDER: (text, TextEncoder(text)),
        }
    total = sum(p.numel() for _, model in parts.values() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    done = 0
    with whole_folder(output) as folder:
        for name, (config, model) in parts.items():
            prefix = "vae." if name == "tokenizer" else ""
            (folder / name).mkdir()
            for count in _write_weights(model, folder / name, prefix, dtype, generator):
                done += count
                progress(done, total)
            _write_json(folder / name / "config.json", config_to_dict(config))
        vocabulary.save(str(folder / TEXT_ENCODER_FOLDER / "tokenizer.json"))
        _write_json(folder / SAMPLING_FILE, shape.sampling)
    return done


def _write_weights(
    model: nn.Module, folder: Path, prefix: str, dtype: str, generator: torch.Generator
) -> Iterator[int]:
    """Write shards and their index; yields the number of weights in each shard."""
    import torch
    from safetensors.torch import save_file

    stored = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in model.named_parameters():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += parameter.numel() * stored.itemsize
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        tensors = {
            prefix + name: random_weight(name, model.get_parameter(name).shape, generator).to(stored)
            for name in names
        }
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else "model.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        yield sum(tensor.numel() for tensor in tensors.values())
    if shards[1:]:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms 1, biases 0, matrices normal with variance 1 / inputs: a layer keeps its input's scale."""
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape)
    if "scale_mul" in name:  # the logarithm of a gain per head
        return torch.full(shape, math.log(4))
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shape",
    required=True,
    metavar="NAME|FILE",
    help=f"Shape file, or one of {', '.join(sorted(file.stem for file in SHAPES.glob('*.json')))}.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to make.")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True)
@click.option("--seed", default=0, show_default=True)
@ends_with_a_sentence
def main(shape: str, output: Path, dtype: str, seed: int) -> None:
    """Make a checkpoint of random numbers in the published layout."""
    from rich.console import Console
    from rich.progress import Progress

    chosen = read_shape(shape)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing weights", total=None)
        count = write_random_checkpoint(
            chosen,
            output,
            dtype,
            seed,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    click.echo(f"{output}: {count / 1e6:.1f} M random weights, {dtype}")


if __name__ == "__main__":
    main()
