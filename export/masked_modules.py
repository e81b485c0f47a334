"""What each graph of a model that draws masked tokens computes (MAR).

Together they are the loop of :func:`hart_runtime.hart.mar_generate.generate_tokens`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.diffusion_schedule import TRAIN_STEPS
from hart_runtime.export.attention import Kernel
from hart_runtime.export.modules import for_halves, halves
from hart_runtime.hart.checkpoint import matrix_parameters
from hart_runtime.hart.diffusion import DiffusionMLP
from hart_runtime.hart.kl_tokenizer import unpatchify
from hart_runtime.hart.mar import at_places
from hart_runtime.hart.model import Mar


class ClassVectorsGraph(nn.Module):
    """Labels to the vectors of both guidance halves; the last label stands for no class."""

    table: Tensor

    def __init__(self, model: Mar) -> None:
        super().__init__()
        with torch.no_grad():
            self.register_buffer("table", model.transformer.class_vectors())

    def forward(self, label: Tensor) -> Tensor:
        asked = F.embedding(label, self.table)
        return torch.cat([asked, self.table[-1:].expand_as(asked)])


class MaskedTransformerGraph(nn.Module):
    """All blocks: of the known tokens to what is known of those that are drawn next, (R, n, C).

    Nobody asks what the last block makes of the other tokens.
    """

    def __init__(self, model: Mar, kernel: Kernel) -> None:
        super().__init__()
        self.transformer, self.kernel = model.transformer, kernel

    def forward(self, tokens: Tensor, condition: Tensor, known: Tensor, predicted: Tensor) -> Tensor:
        """Tokens (B, L, D), class vectors (R, C), places of tokens (B, K) and (B, n)."""
        rows = condition.shape[0]
        places = for_halves(known, rows)
        given = for_halves(at_places(tokens, known), rows)
        encoded = self.transformer.encode(given, places, condition, self.kernel)
        return self.transformer.decode_at(encoded, places, for_halves(predicted, rows), self.kernel)


class Denoising(nn.Module):
    """A step of the diffusion of tokens, the first of as many as its graph is unrolled to.

    What modulates the blocks depends on the time and on what is known of a token, not on the token: it is
    computed for all steps at once, so that three fifths of the weights are read once instead of in every
    step. Of the times themselves a table is left.
    """

    times: Tensor

    def __init__(self, net: DiffusionMLP, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.no_grad():
            self.register_buffer("times", net.time_embed(torch.arange(TRAIN_STEPS)).float())
        self.net = copy.deepcopy(net, {id(weight): weight for weight in net.parameters()})
        del self.net.time_embed
        typed(self.net, dtype)

    def step(
        self,
        x: Tensor,
        embedded: Tensor,
        timesteps: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Of x (B, n, D), embedded (R, n, W); of k steps timesteps (k), coefficients (k, 6) as
        :meth:`hart_runtime.common.diffusion_schedule.DiffusionSchedule.unbounded` has them, guidance (0 for
        none), and noise (k, B, n, D) times its temperature.
        """
        times = F.embedding(timesteps, self.times)[:, None, None]
        modulation = [part[0] for part in self.net.modulation(times + embedded)]
        output = self.net.modulated(for_halves(x, embedded.shape[0]), modulation)
        conditional, unconditional = halves(output, x.shape[0])
        eps, variance = conditional.chunk(2, dim=-1)
        eps = (1 + guidance) * eps - guidance * unconditional.chunk(2, dim=-1)[0]
        recip, recipm1, coef1, coef2, slope, level = coefficients[0].split(1)
        mean = coef1 * (recip * x - recipm1 * eps) + coef2 * x
        return mean + torch.exp(slope * variance + level) * noise[0]


def typed(net: DiffusionMLP, dtype: torch.dtype) -> None:
    """Give the products of a float32 network another type; weights stay those of others that share them."""
    for name in sorted(matrix_parameters(net)) if dtype != torch.float32 else ():
        path, _, own = name.rpartition(".")
        module = net.get_submodule(path)
        setattr(module, own, nn.Parameter(module.get_parameter(own).to(dtype), requires_grad=False))


class PreciseSiLU(nn.Module):
    """ONNX Runtime's Sigmoid is four times as far off as Exp, and the first step multiplies it by 300."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


class BeginGraph(Denoising):
    """What the diffusion is told of tokens, and its first step, in float32."""

    def __init__(self, net: DiffusionMLP) -> None:
        super().__init__(net, torch.float32)
        for name, module in [*self.net.named_modules()]:
            if isinstance(module, nn.SiLU):
                self.net.set_submodule(name, PreciseSiLU())

    def forward(
        self,
        z: Tensor,
        x: Tensor,
        timesteps: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        embedded = self.net.embed_condition(z)
        return embedded, self.step(x, embedded, timesteps, coefficients, guidance, noise)


class DenoiseGraph(Denoising):
    """More steps."""

    def forward(
        self,
        embedded: Tensor,
        x: Tensor,
        timesteps: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        noise: Tensor,
    ) -> Tensor:
        return self.step(x, embedded, timesteps, coefficients, guidance, noise)


class PlaceGraph(nn.Module):
    """Tokens that were drawn, among those that were there; and which are."""

    def forward(self, tokens: Tensor, there: Tensor, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        places = predicted[..., None].expand_as(x)
        return tokens.scatter(1, places, x), there.scatter(1, predicted, torch.ones_like(x[..., 0]))


class TokensLatentGraph(nn.Module):
    """Tokens to the latent; those that are not there yet are shown as the mean of those that are."""

    def __init__(self, model: Mar) -> None:
        super().__init__()
        self.patch, self.scale = model.transformer.config.patch, model.tokenizer.config.latent_scale

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        seen = there[..., None]
        mean = tokens.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return unpatchify(tokens + (1 - seen) * mean, self.patch) / self.scale
