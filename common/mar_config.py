"""Sizes of a masked autoregressive model (MAR, arXiv 2406.11838) and of its tokenizer.

Neither file of a published checkpoint holds a configuration: sizes are read from the shapes of tensors
(:mod:`hart_runtime.hart.mar_checkpoint`), but for the number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hart_runtime.common.config import EPSILON, LAYERS, MOST_LEVELS, WIDTH, Ranges, check_values
from hart_runtime.common.errors import InputError

Heads = tuple[int, int]
"""How many the encoder has, and the decoder."""
GROUPS = 32
"""Of the tokenizer's group norms: every width is a multiple."""


@dataclass(frozen=True)
class MarConfig:
    """Encoder, decoder and diffusion head."""

    num_classes: int
    """What is drawn of none of them has a vector of its own, which is no row of their table."""
    side: int
    """Tokens along one side of a picture."""
    patch: int
    """Latent cells along one side of a token."""
    token_channels: int
    buffer: int
    """Tokens in front of the picture's, in encoder and decoder; the class stands in them."""
    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    encoder_hidden: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    decoder_hidden: int
    diff_width: int
    diff_depth: int
    norm_eps: float = 1e-6

    RANGES: ClassVar[Ranges] = {
        "num_classes": WIDTH,
        "side": (1, 4096),
        "patch": (1, 256),
        "token_channels": WIDTH,
        "buffer": (1, 1 << 16),
        "encoder_dim": WIDTH,
        "encoder_depth": LAYERS,
        "encoder_heads": WIDTH,
        "encoder_hidden": WIDTH,
        "decoder_dim": WIDTH,
        "decoder_depth": LAYERS,
        "decoder_heads": WIDTH,
        "decoder_hidden": WIDTH,
        "diff_width": WIDTH,
        "diff_depth": LAYERS,
        "norm_eps": EPSILON,
    }
    UNREAD: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_values(self)
        for part in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{part}_dim"), getattr(self, f"{part}_heads")
            if dim % heads:
                raise InputError(f"{part}_heads must divide {part}_dim, found {heads} and {dim}")
        if self.token_channels % self.patch**2:
            raise InputError(
                f"token_channels must be a multiple of patch * patch, found {self.token_channels} and "
                f"{self.patch}"
            )

    @property
    def depth(self) -> int:
        """Blocks of both transformers."""
        return self.encoder_depth + self.decoder_depth

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return self.side**2

    @property
    def latent_channels(self) -> int:
        return self.token_channels // self.patch**2

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Sides of latents, in the words of other families: there is one."""
        return (self.latent_side,)

    @property
    def latent_side(self) -> int:
        """Latent cells along one side of a picture."""
        return self.side * self.patch


@dataclass(frozen=True)
class KlConfig:
    """Continuous image tokenizer: an autoencoder whose latents are kept near a normal distribution."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 16
    latent_scale: float = 0.2325
    """Tokens are latents times this; the published code's constant."""

    RANGES: ClassVar[Ranges] = {
        "ch": (1, 1 << 14),
        "ch_mult": (1, 1024),
        "z_channels": WIDTH,
        "latent_scale": (1e-6, 1e6),
    }
    UNREAD: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_values(self)
        if self.ch % GROUPS:
            raise InputError(f"ch must be a multiple of {GROUPS} (GroupNorm groups), found {self.ch}")
        if not 1 <= len(self.ch_mult) <= MOST_LEVELS:
            raise InputError(f"ch_mult: expected 1 to {MOST_LEVELS} levels, found {len(self.ch_mult)}")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)
