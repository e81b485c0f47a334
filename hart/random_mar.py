"""A MAR checkpoint of random numbers in the published layout: two pickled files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hart_runtime.common.checkpoint import TOKENIZER
from hart_runtime.common.config import config_from_dict
from hart_runtime.common.errors import InputError, known_names, one_of, shown
from hart_runtime.common.files import whole_folder
from hart_runtime.common.json_files import read_json
from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.common.precisions import FP32
from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.mar import MarTransformer
from hart_runtime.hart.mar_files import TOKENIZER_NAME, TRANSFORMER_NAME
from hart_runtime.hart.random_weights import DTYPES, MASKED, makers_of, shape_file, write_pickle

SETS = ("model", "model_ema")
"""Keys of the published files, each of which has all weights below it; the second ones are averaged."""


@dataclass(frozen=True)
class MarShape:
    """What a shape file of MAR describes."""

    transformer: MarConfig
    tokenizer: KlConfig


def read_mar_shape(name: str) -> MarShape:
    """A shape that comes with the package, by name, or a shape file; raises InputError."""
    file = shape_file(name)
    values = read_json(file)
    known_names(str(file), values, (MASKED, TOKENIZER))
    for part, cls in ((MASKED, MarConfig), (TOKENIZER, KlConfig)):
        if not isinstance(values.get(part), dict):
            raise InputError(f"{file}: expected an object {part!r}, found {shown(values.get(part))}")
        known_names(f"{file}: {part}", values[part], [f.name for f in fields(cls)])
    transformer = config_from_dict(MarConfig, values[MASKED], f"{file}: {MASKED}")
    tokenizer = config_from_dict(KlConfig, values[TOKENIZER], f"{file}: {TOKENIZER}")
    if transformer.latent_channels != tokenizer.z_channels:
        raise InputError(
            f"{file}: tokens are made of {transformer.latent_channels} latent channels, {TOKENIZER} has "
            f"{tokenizer.z_channels}"
        )
    return MarShape(transformer, tokenizer)


def write_random_mar(
    shape: MarShape,
    output: Path,
    dtype: str = FP32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
    published: bool = False,
) -> int:
    """Write both files of a MAR checkpoint into a folder.

    Args:
        dtype: "fp32" or "fp16", how weights are stored.
        progress: told the number of tensors made and to be made.
        published: also write weights that are not averaged, as published files hold; twice the size.

    Returns:
        How many weights it holds that are used.

    Raises:
        InputError: ``output`` exists or cannot be written.
    """
    one_of("dtype", dtype, DTYPES)
    with torch.device("meta"):
        transformer, tokenizer = MarTransformer(shape.transformer), KlTokenizer(shape.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    files = {
        TRANSFORMER_NAME: (makers_of(transformer, "", dtype, generator), SETS if published else SETS[1:]),
        TOKENIZER_NAME: (makers_of(tokenizer, "", dtype, generator), SETS[:1]),
    }
    total, done = sum(len(makers) * len(sets) for makers, sets in files.values()), 0

    def made() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with whole_folder(output) as folder:
        for name, (makers, sets) in files.items():
            write_pickle(makers, folder / name, made, sets)
    return sum(p.numel() for model in (transformer, tokenizer) for p in model.parameters())
