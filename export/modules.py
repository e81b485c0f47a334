"""What each graph of a bundle computes, as small modules around the reference model.

Together they are the loop of :mod:`hart_runtime.hart.generate`, cut where the host has a decision to make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.schedule import phi_index
from hart_runtime.export import strips
from hart_runtime.hart.diffusion import RESIDUAL_SCALE, denoise, guide
from hart_runtime.hart.model import HybridModel, Model, ScaleModel
from hart_runtime.hart.quantizer import Phi

DRAW_BLOCK = 64
"""Codes that are summed up before one of them is drawn."""


class Part(nn.Module):
    """A function of the reference as a module, so that its nodes carry its name."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def halves(x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Both guidance halves; where there is one alone, twice the same."""
    torch._check(batch <= x.shape[0])
    return x.narrow(0, 0, batch), x.narrow(0, x.shape[0] - batch, batch)


def for_halves(x: Tensor, rows: int) -> Tensor:
    """What both guidance halves are given alike; where there is one alone, that. (B, ...) -> (rows, ...)"""
    torch._check(rows <= 2 * x.shape[0])
    return torch.cat([x, x]).narrow(0, 0, rows)


class SampleGraph(nn.Module):
    """Hidden states to one drawn code per cell of the map, (B, n, n).

    The vocabulary projection is affine, so guidance is applied to its input: one projection
    instead of two. Truncation and the draw are those of :mod:`hart_runtime.hart.sampling`, in float32.
    """

    codebook: Tensor

    def __init__(self, model: ScaleModel) -> None:
        super().__init__()
        self.head_nm = model.transformer.head_nm
        self.head = model.transformer.head
        self.register_buffer("codebook", model.tokenizer.quantize.embedding.weight)

    def forward(
        self,
        hidden: Tensor,
        head_condition: Tensor,
        guidance: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        side = uniform.shape[1]
        hidden = hidden[:, hidden.shape[1] - side * side :]  # scale 0: the last context position
        normed = self.head_nm(hidden, head_condition).unflatten(1, (side, side))
        conditional, unconditional = halves(normed, uniform.shape[0])
        logits = self.head((1 + guidance) * conditional - guidance * unconditional).float()
        k = cast(int, top_k.item())  # symbolic while tracing: k stays a graph input
        torch._check(k >= 1)
        torch._check(k <= logits.shape[-1])
        kept = logits.topk(k, dim=-1).values
        tail = kept.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        # Everything within the first 1 - top_p of the mass goes, but never the largest.
        inside = torch.where(tail > 1 - top_p, kept, torch.inf)
        bound = torch.minimum(inside.amin(-1, keepdim=True), kept[..., :1])
        logits = torch.where(logits < bound, -torch.inf, logits)
        index, mass = draw_in_blocks(logits.softmax(-1), uniform)
        codes = F.embedding(index, self.codebook)
        # NaN anywhere before leaves no mass to draw from; a code would hide it.
        return index, torch.where(mass > 0, codes, torch.nan), logits


def draw_in_blocks(probabilities: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The draw of :func:`hart_runtime.hart.sampling.draw_codes`, first of a block, then of a code in it.

    Sums of 64 and of V / 64 numbers are closer to float64's than one of V, and take a tenth of its time.
    (..., V), (...) -> index (...) int64 and the whole mass (..., 1)
    """
    blocks = F.pad(probabilities, (0, -probabilities.shape[-1] % DRAW_BLOCK)).unflatten(-1, (-1, DRAW_BLOCK))
    cumulative = blocks.sum(-1).cumsum(-1)
    mass = cumulative[..., -1:]
    target = uniform[..., None] * mass
    block = _count_below(cumulative, target)
    before = F.pad(cumulative, (1, 0)).gather(-1, block)
    chosen = blocks.gather(-2, block[..., None].expand(*block.shape, DRAW_BLOCK))[..., 0, :]
    code = _count_below(chosen.cumsum(-1), target - before)
    return (block * DRAW_BLOCK + code)[..., 0], mass


def _count_below(cumulative: Tensor, target: Tensor) -> Tensor:
    """Where a cumulative sum first exceeds a target, never behind its last growth. (..., 1) int64"""
    return ((cumulative <= target) & (cumulative < cumulative[..., -1:])).long().sum(-1, keepdim=True)


class SmoothGraph(nn.Module):
    """Smooth mode: a Gumbel-softmax mixture of codes instead of the drawn code."""

    codebook: Tensor

    def __init__(self, model: ScaleModel) -> None:
        super().__init__()
        self.register_buffer("codebook", model.tokenizer.quantize.embedding.weight)

    def forward(
        self, logits: Tensor, exponential: Tensor, starts: Tensor, logit_gain: Tensor, temperature: Tensor
    ) -> Tensor:
        """Each cell's noise begins at its start in the pool, that of code v is v places further on."""
        places = (starts[..., None] + torch.arange(self.codebook.shape[0])).flatten(1)
        pool = -exponential.log()  # before it is gathered, since then there is more of it
        gumbel = pool.gather(1, places).view_as(logits)
        weights = ((logit_gain * logits + gumbel) / temperature).softmax(-1)
        return weights @ self.codebook


class Accumulating(nn.Module):
    """Codes of one scale onto f_hat, and the cells of the next scale.

    Resampling is a matrix product on each side; the matrices come from the host, so one graph serves
    every pair of sizes, and none of it waits for a size.
    """

    def __init__(self, model: ScaleModel, num_scales: int) -> None:
        super().__init__()
        self.quant_resi = PhiOfScale(model.tokenizer.quantize.quant_resi.phis(), num_scales)

    def accumulate(
        self, h: Tensor, f_hat: Tensor, scale: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        """f_hat (B, Cv, P, P), and (B, n * n, Cv) of the next scale."""
        h = up @ h.permute(0, 3, 1, 2) @ up.T
        f_hat = f_hat + self.quant_resi(h, scale)
        return f_hat, (down @ f_hat @ down.T).flatten(2).transpose(1, 2)


class PhiOfScale(nn.Module):
    """The phi convolution that belongs to a scale, chosen at run time."""

    weight: Tensor
    bias: Tensor
    phi_of_scale: Tensor

    def __init__(self, phis: list[Phi], num_scales: int) -> None:
        super().__init__()
        self.ratio = phis[0].ratio if phis else 0.0
        if phis:
            self.register_buffer("weight", torch.stack([phi.weight for phi in phis]))
            self.register_buffer("bias", torch.stack([phi.bias for phi in phis]))  # type: ignore[misc]
            chosen = [phi_index(k, num_scales, len(phis)) for k in range(num_scales)]
            self.register_buffer("phi_of_scale", torch.tensor(chosen))

    def forward(self, h: Tensor, scale: Tensor) -> Tensor:
        if not self.ratio:
            return h
        phi = self.phi_of_scale.index_select(0, scale)
        weight, bias = (t.index_select(0, phi)[0] for t in (self.weight, self.bias))
        return smoothed(h, weight, bias, self.ratio)


def smoothed(h: Tensor, weight: Tensor, bias: Tensor, ratio: float) -> Tensor:
    """What a phi makes of an upsampled code map."""
    return h * (1 - ratio) + convolve(h, weight, bias) * ratio


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 convolution, zero-padded, with weights that are chosen at run time.

    As a matrix product with the pixels as rows: ONNX Runtime splits a convolution, and a
    product with few columns, over threads in a way that depends on the batch size, and a
    picture must not depend on the batch it is drawn in.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = torch.stack(shifted, dim=2).flatten(1, 2).flatten(2).transpose(1, 2)
    product = patches @ weight.flatten(1).T + bias  # (B, H * W, 9 * C) @ (9 * C, C)
    return product.transpose(1, 2).unflatten(2, (height, width))


class ResidualConditionGraph(nn.Module):
    """Hidden states and drawn codes of the last scale to the diffusion head's condition."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        z = self.transformer.residual_condition(hidden, for_halves(codes.flatten(1, 2), hidden.shape[0]))
        return self.transformer.diffloss.net.embed_condition(z)


class ResidualStepGraph(nn.Module):
    """One denoising step of the residual diffusion MLP."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.net = model.transformer.diffloss.net
        self.guide = Part(guide)
        self.denoise = Part(lambda *args: denoise(*args)["sample"])

    def forward(
        self,
        residual: Tensor,
        embedded: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        noise: Tensor,
    ) -> Tensor:
        output = self.net(for_halves(residual, embedded.shape[0]), timestep, embedded)
        output = self.guide(*halves(output, residual.shape[0]), guidance)
        return self.denoise(residual, output, coefficients, noise)


class LatentGraph(nn.Module):
    """Last codes and residual onto f_hat; no phi, no resampling."""

    def forward(self, f_hat: Tensor, h: Tensor, residual: Tensor) -> Tensor:
        residual = (residual * RESIDUAL_SCALE).unflatten(1, (h.shape[1], h.shape[2]))
        return f_hat + (h + residual).permute(0, 3, 1, 2)


class DecoderGraph(nn.Module):
    """Latent to pixels in [0, 1]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer

    def forward(self, f_hat: Tensor) -> Tensor:
        z = self.tokenizer.post_quant_conv(f_hat.to(self.tokenizer.post_quant_conv.weight.dtype))
        return self.tokenizer.shown(strips.decode(self.tokenizer.decoder, z).float())
