"""Random numbers of the size of trained weights, and files of them as published checkpoints have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.precisions import FP16, FP32, PRECISIONS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hart_runtime.hart.published import Makers

SHAPES = Path(__file__).parent / "shapes"
TRANSFORMER, MASKED = "transformer", "masked"
"""What shapes of VAR and of MAR have in the place of HART's ``llm``."""
DTYPES = (FP32, FP16)
SHARD_BYTES = 1 << 29
"""Tensors are made and written in shards of about this size, so a large model fits in memory."""
TABLES = {
    **{"class_emb": 1.0, "pos_1LC": 0.5, "pos_start": 0.5},
    **{"fake_latent": 1.0, "pos_embed_learned": 0.5, "mask_token": 0.5},
}
"""Spread of embeddings of classes and places, which are added up, and multiply branches through adaLN."""


def shape_file(name: str) -> Path:
    """Of a shape that comes with the package, or the file itself; raises InputError."""
    packaged = {file.stem: file for file in SHAPES.glob("*.json")}
    file = packaged.get(name, Path(name))
    if not file.is_file():
        raise InputError(
            f"{parameter('shape', name)}: expected {' or '.join(sorted(packaged))}, or a file; found neither"
        )
    return file


def makers_of(model: nn.Module, prefix: str, dtype: str, generator: torch.Generator) -> Makers:
    """What makes each weight of a model, by its name behind ``prefix``; another call makes other numbers."""
    import torch

    stored = getattr(torch, PRECISIONS[dtype].traced)

    def maker(name: str, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        return lambda: random_weight(name, shape, generator).to(stored)

    return {prefix + name: maker(name, p.shape) for name, p in model.named_parameters()}


def write_weights(makers: Makers, folder: Path, made: Callable[[], None]) -> None:
    """Write shards, and their index if there are several."""
    from safetensors.torch import save_file

    files: list[Path] = []
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    for number, (name, make) in enumerate(makers.items(), start=1):
        shard[name], places[name] = make(), len(files)
        made()
        if number == len(makers) or sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            files.append(folder / f"shard-{len(files)}")
            save_file(shard, files[-1], metadata={"format": "pt"})
            shard = {}
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file, new in zip(files, names, strict=True):
        file.rename(folder / new)
    weight_map = {name: names[place] for name, place in places.items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_pickle(
    makers: Makers, file: Path, made: Callable[[], None], sets: Sequence[str] | None = None
) -> None:
    """A pickled state dict, made of tensors that lie in a file of their own and not in memory.

    Args:
        sets: keys that whole sets of these weights lie below, each with numbers of its own.
    """
    import torch

    scratch = file.with_suffix(".raw")

    def stored(value: torch.Tensor) -> torch.Tensor:
        start = scratch.stat().st_size if scratch.exists() else 0
        with scratch.open("ab") as raw:
            value.numpy().tofile(raw)
        if not value.ndim:
            return value
        mapped = np.memmap(scratch, np.uint8, "c", start, value.nbytes)
        return torch.from_numpy(mapped).view(value.dtype).view(value.shape)

    def state() -> dict[str, torch.Tensor]:
        found = {}
        for name, make in makers.items():
            found[name] = stored(make())
            made()
        return found

    torch.save(state() if sets is None else {key: state() for key in sets}, file)
    scratch.unlink()


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms 1, biases 0, matrices normal with variance 1 / inputs: a layer keeps its input's scale."""
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape)
    if "scale_mul" in name:  # the logarithm of a gain per head
        return torch.full(shape, math.log(4))
    if len(shape) == 1:
        return torch.ones(shape)
    spread = next((s for part, s in TABLES.items() if part in name), math.prod(shape[1:]) ** -0.5)
    return torch.randn(shape, generator=generator) * spread


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
