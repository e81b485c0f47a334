"""A graph and a model as a manifest describes them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hart_runtime.common.errors import InputError, shown


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; named dimensions are strings such as ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle."""

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    forms: dict[str, str] = field(default_factory=dict)
    """Files of the same graph in other forms, with equal inputs and outputs."""

    @property
    def files(self) -> list[str]:
        """Of all its forms."""
        return [self.file, *self.forms.values()]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, all that the loop and the shapes of its graphs need to know."""

    patch_nums: tuple[int, ...]
    depth: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    latent_channels: int
    image_size: int
    context_token: int
    context_dim: int
    diff_width: int
    """Of the residual diffusion MLP."""
    modulated: bool = False
    """Whether the blocks are modulated by a pooled condition."""

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that stand for them in the shapes of graphs."""
        last = self.patch_nums[-1]
        return {
            "tokens": self.context_token,
            "context_dim": self.context_dim,
            "dim": self.embed_dim,
            "head": self.embed_dim // self.num_heads,
            "vocab": self.vocab_size,
            "channels": self.latent_channels,
            "width": self.diff_width,
            "last": last,
            "cells": last * last,
            "pixels": self.image_size,
        }


LARGEST = {
    "depth": 512,
    "embed_dim": 1 << 16,
    "num_heads": 1 << 10,
    "vocab_size": 1 << 20,
    "latent_channels": 1 << 12,
    "image_size": 1 << 14,
    "context_token": 1 << 16,
    "context_dim": 1 << 16,
    "diff_width": 1 << 16,
}
"""More than any model has: beyond is a damaged file, or one that wants to take the machine's memory."""


def check_model(model: ModelSpec, place: str) -> None:
    """Refuse sizes that no model has, or that contradict each other; raises InputError."""
    for name, most in LARGEST.items():
        if not 1 <= (size := getattr(model, name)) <= most:
            raise InputError(f"{place}: {name}: expected 1 to {most}, found {shown(size)}")
    sides = model.patch_nums
    if len(sides) < 2 or sides[0] < 1 or any(b < a for a, b in itertools.pairwise(sides)):
        raise InputError(
            f"{place}: patch_nums: expected sides that do not shrink, found {shown(list(sides))}"
        )
    for name, size, by, divisor in (
        ("embed_dim", model.embed_dim, "num_heads", model.num_heads),
        ("image_size", model.image_size, "the last of patch_nums", sides[-1]),
    ):
        if size % divisor:
            raise InputError(f"{place}: {name}: expected a multiple of {by} ({divisor}), found {size}")
