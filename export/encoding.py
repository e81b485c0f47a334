"""What the encoder's graph computes: a picture to its latent, and to the codes of every scale.

All scales are one graph: nothing is decided between them, and the sides of a bundle's maps are fixed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.schedule import downsample_matrix, phi_index, upsample_matrix
from hart_runtime.export import strips
from hart_runtime.hart.model import ScaleModel


class EncoderGraph(nn.Module):
    """Pixels in [-1, 1] to latent, indices, codes, and the latent that the codes alone make.

    Quantization is that of :meth:`hart_runtime.hart.quantizer.HybridQuantizer.encode`, in float32; a
    squared distance is compared without the part that all codes have in common.
    """

    codebook: Tensor

    def __init__(self, model: ScaleModel, patch_nums: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.quant_conv = model.tokenizer.encoder, model.tokenizer.quant_conv
        quantizer, last = model.tokenizer.quantize, len(patch_nums) - 1
        self.register_buffer("codebook", quantizer.embedding.weight)
        phis = quantizer.quant_resi.phis()
        places = [phi_index(k, len(patch_nums), len(phis)) if phis else None for k in range(last + 1)]
        if not quantizer.phi_on_last:
            places[-1] = None
        self.phis = [None if place is None else phis[place] for place in places]
        size = patch_nums[-1]
        self.down = [torch.from_numpy(downsample_matrix(size, side)) for side in patch_nums]
        self.up = [torch.from_numpy(upsample_matrix(side, size)) for side in patch_nums]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) to (B, Cv, P, P), (B, cells) int64, (B, cells, Cv) and (B, Cv, P, P)."""
        h = strips.encode(self.encoder, image.to(self.quant_conv.weight.dtype))
        latent = rest = self.quant_conv(h).float()
        half_squares = self.codebook.square().sum(1, keepdim=True) / 2
        indices, codes = [], []
        for down, up, phi in zip(self.down, self.up, self.phis, strict=True):
            whole = len(down) == down.shape[1]
            coarse = rest if whole else down @ rest @ down.T
            index = (half_squares - self.codebook @ coarse.flatten(2)).argmin(1)  # (B, V, n * n) before
            found = F.embedding(index, self.codebook)
            indices.append(index)
            codes.append(found)
            h = found.transpose(1, 2).unflatten(2, coarse.shape[2:])
            if not whole:
                h = up @ h @ up.T
            rest = rest - (h if phi is None else phi(h))
        return latent, torch.cat(indices, 1), torch.cat(codes, 1), latent - rest
