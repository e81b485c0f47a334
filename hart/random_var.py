"""A VAR checkpoint of random numbers in the published layout: two pickled files, with all that they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hart_runtime.common.checkpoint import TOKENIZER
from hart_runtime.common.config import (
    DISCRETE,
    ClassTransformerConfig,
    TokenizerConfig,
    config_from_dict,
)
from hart_runtime.common.errors import InputError, known_names, one_of, shown
from hart_runtime.common.files import whole_folder
from hart_runtime.common.json_files import read_json
from hart_runtime.common.precisions import FP32
from hart_runtime.hart.class_transformer import ClassTransformer
from hart_runtime.hart.published import llm_buffers, var_names
from hart_runtime.hart.random_weights import DTYPES, TRANSFORMER, makers_of, shape_file, write_pickle
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.var_checkpoint import stored_name


@dataclass(frozen=True)
class VarShape:
    """What a shape file of VAR describes."""

    transformer: ClassTransformerConfig
    tokenizer: TokenizerConfig

    @property
    def files(self) -> tuple[str, str]:
        """What the published files of such a model are called."""
        transformer, tokenizer = var_names(self.transformer, self.tokenizer)
        return f"{transformer}.pth", f"{tokenizer}.pth"


def read_var_shape(name: str) -> VarShape:
    """A shape that comes with the package, by name, or a shape file; raises InputError."""
    file = shape_file(name)
    values = read_json(file)
    known_names(str(file), values, (TRANSFORMER, TOKENIZER))
    for part in (TRANSFORMER, TOKENIZER):
        if not isinstance(values.get(part), dict):
            raise InputError(f"{file}: expected an object {part!r}, found {shown(values.get(part))}")
    own = [f.name for f in fields(ClassTransformerConfig)]
    known_names(f"{file}: {TRANSFORMER}", values[TRANSFORMER], own)
    transformer = config_from_dict(ClassTransformerConfig, values[TRANSFORMER], f"{file}: {TRANSFORMER}")
    image = {
        **values[TOKENIZER],
        "quantizer_type": DISCRETE,
        "v_patch_nums": list(transformer.patch_nums),
    }
    return VarShape(transformer, config_from_dict(TokenizerConfig, image, f"{file}: {TOKENIZER}"))


def write_random_var(
    shape: VarShape,
    output: Path,
    dtype: str = FP32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Write both files of a VAR checkpoint into a folder.

    Args:
        dtype: "fp32" or "fp16", how weights are stored.
        progress: told the number of tensors made and to be made.

    Returns:
        How many weights they hold.

    Raises:
        InputError: ``output`` exists or cannot be written.
    """
    one_of("dtype", dtype, DTYPES)
    image = shape.tokenizer
    with torch.device("meta"):
        transformer = ClassTransformer(shape.transformer, image.vocab_size, image.z_channels)
        tokenizer = ImageTokenizer(image)
    generator = torch.Generator().manual_seed(seed)
    own = makers_of(transformer, "", dtype, generator)
    hits = len(image.v_patch_nums), image.vocab_size
    files = {
        shape.files[0]: {stored_name(name): make for name, make in own.items()}
        | llm_buffers(shape.transformer),
        shape.files[1]: makers_of(tokenizer, "", dtype, generator)
        | {"quantize.ema_vocab_hit_SV": lambda: torch.zeros(hits)},
    }
    total, done = sum(map(len, files.values())), 0

    def made() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with whole_folder(output) as folder:
        for name, makers in files.items():
            write_pickle(makers, folder / name, made)
    return sum(p.numel() for model in (transformer, tokenizer) for p in model.parameters())
