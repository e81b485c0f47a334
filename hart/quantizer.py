"""Multi-scale hybrid quantizer: a discrete index map per scale and a continuous rest.

HART, section 3.1: the discrete tokens of all scales carry the big picture; what they
leave over at the last scale (the residual) is kept as continuous numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.config import TokenizerConfig
from hart_runtime.common.schedule import phi_index


class HybridTokens(NamedTuple):
    """What the quantizer makes of a latent."""

    indices: list[Tensor]
    """Per scale (B, n * n) int64."""
    rest: Tensor
    """(B, Cv, P, P): what is left of the latent before the last scale's discrete code."""


class Phi(nn.Conv2d):
    """Smooths an upsampled code map: (1 - r) * h + r * conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class PhiBank(nn.Module):
    """The phi convolutions, stored under the key layout that ``share_quant_resi`` asks for."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        phis = [Phi(config.z_channels, config.quant_resi) for _ in range(config.num_phi)]
        if not phis:
            pass  # quant_resi = 0 stores nothing
        elif config.share_quant_resi == 0:  # one per scale: quant_resi.0, quant_resi.1, ...
            for i, phi in enumerate(phis):
                self.add_module(str(i), phi)
        elif config.share_quant_resi == 1:
            self.qresi = phis[0]
        else:
            self.qresi_ls = nn.ModuleList(phis)

    def phis(self) -> list[Phi]:
        """In tick order."""
        return [m for m in self.modules() if isinstance(m, Phi)]

    def forward(self, h: Tensor, scale: int, num_scales: int) -> Tensor:
        phis = self.phis()
        return phis[phi_index(scale, num_scales, len(phis))](h) if phis else h


class HybridQuantizer(nn.Module):
    """Codebook and pyramid. Latents are float32, (B, Cv, P, P)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.phi_on_last = not config.hybrid
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = PhiBank(config)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the closest code (Euclidean) of each vector, (N, Cv) -> (N,)."""
        codebook = self.embedding.weight
        distance = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.addmm(distance, z, codebook.T, alpha=-2).argmin(1)

    def lookup(self, indices: Tensor, patch_num: int) -> Tensor:
        """Codes of an index map, (B, n * n) -> (B, Cv, n, n)."""
        codes = self.embedding(indices)
        return codes.transpose(1, 2).reshape(len(indices), -1, patch_num, patch_num)

    def contribution(
        self, h: Tensor, scale: int, patch_nums: Sequence[int], phi_on_last: bool = False
    ) -> Tensor:
        """What the code map h of a scale adds to f_hat, (B, Cv, n, n) -> (B, Cv, P, P).

        The last scale is added as it is, without phi; VAR, and the reconstruction helper
        of the published code, apply phi there too (``phi_on_last``).
        """
        last = scale == len(patch_nums) - 1
        if last and not phi_on_last:
            return h
        if not last:
            size = patch_nums[-1]
            h = F.interpolate(h, size=(size, size), mode="bicubic")
        return cast(Tensor, self.quant_resi(h, scale, len(patch_nums)))

    def encode(self, f: Tensor, patch_nums: Sequence[int]) -> HybridTokens:
        """Quantize a latent f (B, Cv, P, P) scale by scale on what is left of it."""
        rest = f
        before_last = rest
        indices = []
        for scale, patch_num in enumerate(patch_nums):
            before_last = rest
            coarse = shrink(rest, patch_num)
            flat = coarse.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
            index = self.nearest(flat).reshape(len(f), -1)
            rest = rest - self.contribution(self.lookup(index, patch_num), scale, patch_nums)
            indices.append(index)
        return HybridTokens(indices, before_last)

    def accumulate(
        self, indices: Sequence[Tensor], patch_nums: Sequence[int], phi_on_last: bool = False
    ) -> list[Tensor]:
        """f_hat after each scale, built from index maps."""
        f_hats: list[Tensor] = []
        for scale, (index, patch_num) in enumerate(zip(indices, patch_nums, strict=True)):
            h = self.contribution(self.lookup(index, patch_num), scale, patch_nums, phi_on_last)
            f_hats.append(f_hats[-1] + h if f_hats else h)
        return f_hats

    def transformer_inputs(self, f_hats: Sequence[Tensor], patch_nums: Sequence[int]) -> Tensor:
        """Teacher-forcing input of scales 1 .. S-1, (B, sum of n_k * n_k, Cv)."""
        maps = [
            shrink(f_hat, n).flatten(2).transpose(1, 2)
            for f_hat, n in zip(f_hats[:-1], patch_nums[1:], strict=True)
        ]
        return torch.cat(maps, dim=1)


def shrink(f: Tensor, patch_num: int) -> Tensor:
    """Area-downsample a latent to n x n cells."""
    if f.shape[-1] == patch_num:
        return f
    return F.adaptive_avg_pool2d(f, (patch_num, patch_num))
