"""A small MLP that denoises one latent vector per token.

MAR's diffusion head (Li et al., 2024) with learned variance and classifier-free guidance on the
predicted noise only. MAR draws the tokens themselves with it, in 100 respaced steps; HART what its codes
leave over, in 8 and within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hart_runtime.common.config import ClassHartConfig, TransformerConfig
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.hart.layers import Linear, RMSNorm, TimestepEmbedder

RESIDUAL_SCALE = 0.6
"""The network works on residual / 0.6, clamped to [-1, 1] (a constant of the published code)."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 at any precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(_modulate(self.in_ln(x), shift, scale)).float()


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale)).float()


class DiffusionMLP(nn.Module):
    """(x_t, t, condition) -> [eps, variance], channels last, (N, 2 * Cv)."""

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = Linear(condition_dim, width)
        self.input_proj = Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def embed_condition(self, z: Tensor) -> Tensor:
        """The part that depends on the token only, the same in every step. (N, C) -> (N, W)"""
        return self.cond_embed(z).float()

    def forward(self, x: Tensor, t: Tensor, embedded: Tensor) -> Tensor:
        return self.modulated(x, self.modulation(self.time_embed(t) + embedded))

    def modulation(self, y: Tensor) -> Iterator[Tensor]:
        """What depends on time and condition alone: of every block (..., 3W), of the last layer (..., 2W).

        One after another: of a large map each takes 100 MB.
        """
        return (layer.adaLN_modulation(y).float() for layer in (*self.res_blocks, self.final_layer))

    def modulated(self, x: Tensor, modulation: Iterable[Tensor]) -> Tensor:
        """The rest. (N, D) -> (N, 2D)"""
        x = self.input_proj(x).float()
        for layer, own in zip((*self.res_blocks, self.final_layer), modulation, strict=True):
            x = layer(x, own)
        return x


def guide(conditional: Tensor, unconditional: Tensor, guidance: Tensor | float) -> Tensor:
    """Guidance on eps only; the variance is that of the conditional half. (N, 2Cv) each -> (N, 2Cv)"""
    eps, variance = conditional.chunk(2, dim=-1)
    eps_uncond = unconditional.chunk(2, dim=-1)[0]
    return torch.cat([(1 + guidance) * eps - guidance * eps_uncond, variance], dim=-1)


def guide_tokens(conditional: Tensor, unconditional: Tensor, guidance: Tensor | float) -> Tensor:
    """The same in MAR's words, where 1 is without guidance: u + g * (c - u). (N, 2D) each -> (N, 2D)"""
    eps, variance = conditional.chunk(2, dim=-1)
    eps_uncond = unconditional.chunk(2, dim=-1)[0]
    return torch.cat([eps_uncond + guidance * (eps - eps_uncond), variance], dim=-1)


def denoise(
    x: Tensor, output: Tensor, coefficients: Tensor, noise: Tensor, bound: float | None = 1.0
) -> dict[str, Tensor]:
    """One step x_t -> x_{t-1}, all in float32, with every intermediate under its usual name.

    ``coefficients`` are those of :meth:`DiffusionSchedule.coefficients`. At the noisiest
    step they amplify eps by 2e4, hence no half precision here. ``bound`` is HART's, on both sides of
    the denoised estimate; MAR has none.
    """
    recip, recipm1, coef1, coef2, log_beta, log_posterior, gate = coefficients.unbind()
    eps, variance = output.chunk(2, dim=-1)
    x0 = recip * x - recipm1 * eps
    if bound is not None:
        x0 = x0.clamp(-bound, bound)
    mean = coef1 * x0 + coef2 * x
    fraction = (variance + 1) / 2
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior
    sample = mean + gate * torch.exp(0.5 * log_variance) * noise
    return {"pred_xstart": x0, "mean": mean, "log_variance": log_variance, "sample": sample}


class TokenDiffusion(nn.Module):
    """The diffusion head (``diffloss.`` in a checkpoint) and its training loss."""

    bound: float | None = None
    """Of targets, on both sides."""
    exact = True
    """It is loaded in float32 whatever the others are in: its first step multiplies rounding by hundreds."""

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.net = DiffusionMLP(channels, condition_dim, width, depth)

    def loss(self, z: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Noise prediction plus the variational bound for the variance, mean over tokens.

        Improved DDPM, section 3.1: the bound does not push on the mean and is weighted by
        1/1000 of its sum over the chain, i.e. taken once per sampled step.
        ``z`` (N, C) condition, ``target`` (N, D) what is to be drawn.
        """
        schedule = diffusion_schedule("")
        t = torch.randint(len(schedule), (len(target),), generator=generator)
        noise = torch.randn(target.shape, generator=generator).to(target.device)

        def at(values: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(values).float()[t, None].to(target.device)

        bar = at(schedule.alphas_cumprod)
        x = bar.sqrt() * target + (1 - bar).sqrt() * noise
        t = t.to(target.device)
        eps, variance = self.net(x, t, self.net.embed_condition(z)).chunk(2, dim=-1)
        simple = (eps - noise).square().mean()

        predicted = (x - (1 - bar).sqrt() * eps.detach()) / bar.sqrt()
        if self.bound is not None:
            predicted = predicted.clamp(-self.bound, self.bound)
        coef1, coef2 = at(schedule.posterior_mean_coef1), at(schedule.posterior_mean_coef2)
        log_posterior = at(schedule.posterior_log_variance_clipped)
        fraction = (variance + 1) / 2
        log_variance = fraction * at(schedule.log_betas) + (1 - fraction) * log_posterior
        spread = torch.exp(-log_variance)
        divergence = log_variance - log_posterior + torch.exp(log_posterior) * spread - 1
        kl = 0.5 * (divergence + (coef1 * (target - predicted)).square() * spread)
        mean = coef1 * predicted + coef2 * x
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (target - mean).square() * spread)
        limit = torch.where(t[:, None] == 0, nll, kl) / math.log(2)
        return simple + limit.mean()


class ResidualDiffusion(TokenDiffusion):
    """HART's, whose targets are residuals in latent units."""

    bound = 1.0
    exact = False

    def __init__(self, config: TransformerConfig | ClassHartConfig, channels: int) -> None:
        super().__init__(channels, config.embed_dim, config.diff_width, config.diff_depth)

    def loss(self, z: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return super().loss(z, target / RESIDUAL_SCALE, generator)


class WithResidual(nn.Module):
    """What a transformer over hybrid tokens has beside its blocks, whatever it draws."""

    word_embed: Linear

    def add_residual(self, config: TransformerConfig | ClassHartConfig, channels: int) -> None:
        self.decoder_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.diffloss = ResidualDiffusion(config, channels)

    def residual_condition(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """What the diffusion head is told per token: z (N, L, C).

        ``hidden`` (N, L, C) is the raw block output, ``codes`` (N, L, Cv) the hard drawn
        codes, also in smooth mode. No level embedding.
        """
        return self.decoder_norm(hidden + self.word_embed(codes).float())
