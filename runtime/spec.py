"""A graph and a model as a manifest describes them."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace

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
    context_token: int = 0
    """Of a text; 0 where none is drawn."""
    context_dim: int = 0
    diff_width: int = 0
    """Of the residual diffusion MLP; 0 where there is none."""
    modulated: bool = False
    """Whether the blocks are modulated by a pooled condition."""
    num_classes: int = 0
    """Of pictures; 0 where none is drawn."""
    extent: int = 0
    """Side of the map that the weights know positions of, where the last scale is another."""
    patch: int = 0
    """Cells of the latent along one side of a masked token; 0 where no tokens are masked."""
    buffer: int = 0
    """Tokens of the class before those of the picture."""
    decoder_dim: int = 0
    """Of the transformer that fills in masked tokens; ``embed_dim`` is that of known ones."""

    @property
    def reach(self) -> int:
        """Side of the map whose extent positions are spread over."""
        return self.extent or self.patch_nums[-1]

    def resized(self, patch_nums: tuple[int, ...]) -> ModelSpec:
        """The same weights with other scales; positions stay spread over the extent that they know."""
        last = patch_nums[-1]
        return replace(
            self,
            patch_nums=patch_nums,
            image_size=self.image_size // self.patch_nums[-1] * last,
            extent=0 if last == self.reach else self.reach,
        )

    @property
    def num_tokens(self) -> int:
        """Of a picture: of all scales, or those that are masked at first."""
        if self.patch:
            return (self.patch_nums[-1] // self.patch) ** 2
        return sum(side * side for side in self.patch_nums)

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    @property
    def prunable(self) -> bool:
        """Whether tokens may be left out: the published pruning is for blocks that nothing modulates."""
        return not (self.modulated or self.num_classes)

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that stand for them in the shapes of graphs."""
        first, last = self.patch_nums[0], self.patch_nums[-1]
        return {
            "tokens": self.context_token,
            "context_dim": self.context_dim,
            "depth": self.depth,
            "dim": self.embed_dim,
            "head": self.embed_dim // self.num_heads,
            "vocab": self.vocab_size,
            "channels": self.latent_channels,
            "width": self.diff_width,
            "first": first * first,
            "last": last,
            "cells": last * last,
            "pixels": self.image_size,
            "pyramid": sum(side * side for side in self.patch_nums),
            "grid": self.num_tokens,
            "token": self.latent_channels * self.patch**2,
            "buffer": self.buffer,
            "decoder_dim": self.decoder_dim,
        }


@dataclass(frozen=True)
class OtherSize:
    """Pictures of another size than a bundle's own, of the same weights."""

    patch_nums: tuple[int, ...]
    graphs: dict[str, GraphSpec]
    """Those of its maps; the bundle's own serve both where nothing depends on the size."""


LARGEST = {
    "depth": 512,
    "embed_dim": 1 << 16,
    "num_heads": 1 << 10,
    "latent_channels": 1 << 12,
    "image_size": 1 << 14,
}
"""More than any model has: beyond is a damaged file, or one that wants to take the machine's memory."""
LARGEST_OWN = {
    "context_token": 1 << 16,
    "context_dim": 1 << 16,
    "diff_width": 1 << 16,
    "num_classes": 1 << 20,
    "vocab_size": 1 << 20,
    "patch": 1 << 6,
    "buffer": 1 << 12,
    "decoder_dim": 1 << 16,
}
"""The same of sizes that some models have not."""


def check_model(model: ModelSpec, own: Collection[str], place: str) -> None:
    """Refuse sizes that no model has, or that contradict each other.

    Args:
        own: names of those that not every model has, and this one does.

    Raises:
        InputError: begins with ``place``.
    """
    limits = {name: (1, most) for name, most in LARGEST.items()}
    limits |= {name: (1, most) if name in own else (0, 0) for name, most in LARGEST_OWN.items()}
    limits["extent"] = (0, LARGEST["image_size"] if "context_token" in own else 0)
    for name, (least, most) in limits.items():
        if not least <= (size := getattr(model, name)) <= most:
            expected = f"{least} to {most}" if most else "0"
            raise InputError(f"{place}: {name}: expected {expected}, found {shown(size)}")
    sides = model.patch_nums
    fewest = 1 if "patch" in own else 2
    if len(sides) < fewest or sides[0] < 1 or any(b < a for a, b in itertools.pairwise(sides)):
        raise InputError(
            f"{place}: patch_nums: expected sides that do not shrink, found {shown(list(sides))}"
        )
    for name, size, by, divisor in (
        ("embed_dim", model.embed_dim, "num_heads", model.num_heads),
        ("image_size", model.image_size, "the last of patch_nums", sides[-1]),
    ):
        if size % divisor:
            raise InputError(f"{place}: {name}: expected a multiple of {by} ({divisor}), found {size}")
