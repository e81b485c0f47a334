"""A graph and a model as a manifest describes them."""

from __future__ import annotations

from dataclasses import dataclass, field


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
