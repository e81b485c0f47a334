"""What a given picture is to a drawing: codes, a latent, and where they are kept.

The published code has this for VAR alone. HART's tokens end in a continuous rest, so there is a rule more: a
kept cell takes the given picture's own latent, whatever the drawing has made of its neighbours by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hart_runtime.common.editing import Cells
from hart_runtime.hart.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Kept:
    """Of a batch of given pictures, what is kept."""

    codes: tuple[Tensor, ...]
    """Of each scale (B, Cv, n, n)."""
    latent: Tensor
    """(B, Cv, P, P): codes and rest together."""
    cells: tuple[Tensor, ...]
    """Of each scale (B, 1, n, n), True where a code is kept."""

    def in_map(self, h: Tensor, scale: int) -> Tensor:
        """A drawn code map with the kept codes in it. (B, Cv, n, n)"""
        return torch.where(self.cells[scale], self.codes[scale], h)

    def in_latent(self, f_hat: Tensor) -> Tensor:
        """A drawn latent with the kept one in it. (B, Cv, P, P)

        The residual of a drawn cell belongs to the codes that were drawn; what is left of the picture at a
        kept cell is left of its own codes. At a border either is off by what the other side's codes have
        spilled over it, in upsampling and by phi. So the rest is not added to what is there: the latent is
        put in its place, and a kept cell is what the tokenizer makes of the picture, up to the border.
        """
        return torch.where(self.cells[-1], self.latent, f_hat)


@torch.inference_mode()
def kept_of(
    tokenizer: ImageTokenizer, images: Tensor, cells: Sequence[Cells], patch_nums: tuple[int, ...]
) -> Kept:
    """Encode pictures, and keep what is said.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        cells: of each scale (B, n, n), see :mod:`hart_runtime.common.editing`.
    """
    quantizer, latent = tokenizer.quantize, tokenizer.latent(images).float()
    indices = quantizer.encode(latent, patch_nums).indices
    codes = tuple(quantizer.lookup(index, side) for index, side in zip(indices, patch_nums, strict=True))
    return Kept(codes, latent, tuple(torch.from_numpy(kept)[:, None] for kept in cells))
