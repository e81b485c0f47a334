"""MAR's reference loop: classes to pixels, a few tokens more in every step, in PyTorch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.common.diffusion_schedule import DiffusionSchedule
from hart_runtime.common.masking import TokenStep
from hart_runtime.common.noise import TokenNoise
from hart_runtime.hart.diffusion import denoise, guide_tokens
from hart_runtime.hart.generate import Record, ignore
from hart_runtime.hart.kl_tokenizer import pixels, unpatchify
from hart_runtime.hart.mar import MarTransformer, at_places
from hart_runtime.hart.model import Mar


@torch.inference_mode()
def generate_tokens(
    model: Mar,
    labels: Tensor,
    noise: TokenNoise,
    steps: Sequence[TokenStep],
    schedule: DiffusionSchedule,
    temperature: float = 1.0,
    record: Record = ignore,
) -> Tensor:
    """Draw a picture of each class.

    Args:
        labels: (B,) int64; ``num_classes`` draws of none.
        noise: orders and all random numbers of the run.
        steps: of :func:`hart_runtime.common.masking.token_steps`, for the model's tokens.
        schedule: of the diffusion that draws a token.
        temperature: of the noise of denoising steps; not of the one that they begin with.
        record: receives every tensor under the name that the recorded runs use.

    Returns:
        (B, 3, H, W) pixels in [0, 1] and half a byte more, as
        :meth:`hart_runtime.hart.kl_tokenizer.KlTokenizer.shown` makes them.
    """
    transformer, config = model.transformer, model.transformer.config
    batch, device = len(labels), labels.device
    record("label", labels)
    orders = noise.order(config.tokens)
    record("orders", torch.from_numpy(orders))
    guided = steps[0].guided
    condition = transformer.condition(labels, guided)
    record("condition", transformer.condition(labels, guided=True))
    halves = 2 if guided else 1
    tokens = torch.zeros(batch, config.tokens, config.token_channels, device=device)
    unknown = torch.ones(batch, config.tokens, dtype=torch.bool, device=device)

    for step in steps:
        name = f"step{step.index}"
        record(f"{name}.mask", unknown)
        known = torch.from_numpy(step.known_places(orders)).to(device)
        wanted = torch.from_numpy(step.predicted_places(orders)).to(device)
        both = known.repeat(halves, 1)
        encoded = transformer.encode(at_places(tokens, known).repeat(halves, 1, 1), both, condition)
        record(f"{name}.enc_out", encoded)
        said = transformer.decode(encoded, both)
        record(f"{name}.dec_out", said)
        z = at_places(said, wanted.repeat(halves, 1)).flatten(0, 1)
        record(f"{name}.z", z)
        drawn = _denoised(transformer, z, noise, step, schedule, temperature, record)
        record(f"{name}.sampled", drawn)
        new = drawn.unflatten(0, (batch, -1))
        tokens = tokens.scatter(1, wanted[..., None].expand_as(new), new)
        predicted = torch.zeros_like(unknown).scatter(1, wanted, True)
        record(f"{name}.pred", predicted)
        unknown = unknown & ~predicted
        record(f"{name}.tokens", tokens)
        record(f"{name}.there", (~unknown).float())

    latent = unpatchify(tokens, config.patch)
    record("latent", latent)
    record("final.f_hat", latent / model.tokenizer.config.latent_scale)
    unclamped = model.tokenizer.decode_tokens(tokens, config.patch)
    record("unclamped", unclamped)
    record("png", pixels(unclamped))
    image = model.tokenizer.shown(unclamped)
    record("image", image)
    return image


def _denoised(
    transformer: MarTransformer,
    z: Tensor,
    noise: TokenNoise,
    step: TokenStep,
    schedule: DiffusionSchedule,
    temperature: float,
    record: Record,
) -> Tensor:
    """Draw the tokens of a step, picture after picture. z (halves * B * n, Cd) -> (B * n, D)"""
    net, channels = transformer.diffloss.net, transformer.config.token_channels
    embedded = net.embed_condition(z)
    record(f"step{step.index}.embedded", embedded)
    name = f"step{step.index}.diff"

    def supplied(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(z.device)

    x = supplied(noise.token_start(step.index, step.predicted, channels)).flatten(0, 1)
    record(f"{name}.init_noise", x)
    # (B, T, n, D) -> (T, B * n, D): all pictures' of one denoising step
    noises = supplied(noise.token_steps(step.index, len(schedule), step.predicted, channels))
    noises = noises.transpose(0, 1).flatten(1, 2)
    record(f"{name}.noise", noises)
    told: dict[str, list[Tensor]] = defaultdict(list)
    for run, index in enumerate(reversed(range(len(schedule)))):
        told["x_t"].append(x)
        t = torch.tensor([int(schedule.timesteps[index])], device=z.device)
        output = net(x.repeat(2, 1) if step.guided else x, t, embedded)
        told["net_out"].append(output)
        if step.guided:
            conditional, unconditional = output.chunk(2)
            output = guide_tokens(conditional, unconditional, step.guidance)
        told["model_out"].append(output)
        if not run:
            record(f"{name}.begun_with", output)
        coefficients = supplied(schedule.coefficients(index))
        result = denoise(x, output, coefficients, noises[run] * temperature, bound=None)
        for key in ("pred_xstart", "mean", "log_variance"):
            told[key].append(result[key])
        x = result["sample"]
        record(f"{name}.after{run}", x)
    for key, values in told.items():
        record(f"{name}.{key}", torch.stack(values))
    return x
