"""The reference loop: text features to pixels, scale after scale, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.noise import Noise
from hart_runtime.common.schedule import cell_positions, residual_guidance, scale_steps
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.diffusion import RESIDUAL_SCALE, denoise, guide
from hart_runtime.hart.model import Hart
from hart_runtime.hart.quantizer import shrink
from hart_runtime.hart.rope import context_angles, image_angles
from hart_runtime.hart.sampling import draw_codes, guide_logits, smooth_codes, truncate, windows

Record = Callable[[str, Tensor], None]
"""Called with the name and value of every tensor of the trajectory."""


def _ignore(name: str, value: Tensor) -> None:
    pass


@torch.inference_mode()
def generate(
    model: Hart,
    features: Tensor,
    mask: Tensor,
    noise: Noise,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...] | None = None,
    record: Record = _ignore,
) -> Tensor:
    """Draw a batch of pictures.

    Args:
        features: (B, T, context_dim) text features, padded positions included.
        mask: (B, T) bool, True for real tokens.
        noise: all random numbers of the run.
        settings: how to sample.
        patch_nums: another pyramid than the checkpoint's own; with rotary attention and
            timestep level embeddings no weight depends on it.
        record: receives every tensor under the name the recorded runs use, among them all
            that an exported graph takes or returns.

    Returns:
        (B, 3, H, W) pixels in [0, 1].
    """
    llm, quantizer = model.transformer, model.tokenizer.quantize
    patch_nums = patch_nums or llm.config.patch_nums
    steps = scale_steps(patch_nums, settings, len(quantizer.embedding.weight))
    batch, size, head_dim = len(features), patch_nums[-1], llm.config.head_dim

    def supplied(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(features.device)

    record("ctx.features", features)
    record("ctx.mask", mask)
    context = llm.context(features, mask)
    record("cond", context.tokens)
    record("head_condition", context.head_condition)
    record("block_condition", context.block_condition)
    levels = llm.level_embeddings(len(patch_nums))
    position_ids = mask.long().cumsum(1) - 1
    position_ids = torch.cat([position_ids, torch.zeros_like(position_ids)])
    record("offset", position_ids[:, -1:].float())
    x = context.tokens + levels[0]
    angles = context_angles(position_ids, head_dim)
    f_hat = torch.zeros(batch, model.tokenizer.config.z_channels, size, size, device=x.device)
    cache = None

    for step in steps:
        name = f"scale{step.index}"
        record(f"{name}.x_in", x)
        record(f"{name}.angles", angles)
        hidden, cache = llm(x, angles, context.block_condition, cache)
        record(f"{name}.hidden", hidden)
        raw = llm.logits(hidden, context.head_condition)
        if step.index == 0:
            raw = raw[:, -1:]  # the last context position, padded or not, predicts scale 0
        record(f"{name}.logits_raw", raw)
        logits = guide_logits(raw, step.guidance)
        record(f"{name}.cfg_t", torch.tensor(step.guidance, dtype=torch.float64))
        record(f"{name}.logits_cfg", logits)
        logits = truncate(logits, step.top_k, step.top_p)
        record(f"{name}.logits_kept", logits)
        uniform = supplied(noise.uniform(step.index, step.num_tokens))
        record(f"{name}.u", uniform)
        index = draw_codes(logits, uniform)
        record(f"{name}.idx", index)
        codes = quantizer.embedding(index)
        record(f"{name}.codes", codes)
        h = codes
        if settings.smooth:
            pool, start = noise.exponential(step.index, step.num_tokens, logits.shape[-1])
            exponential = windows(supplied(pool), supplied(start), logits.shape[-1])
            record(f"{name}.gumbel_exp", exponential)
            h = smooth_codes(logits, exponential, quantizer.embedding.weight, step)
        h = h.transpose(1, 2).unflatten(-1, (step.patch_num, step.patch_num))
        if step is steps[-1]:
            break
        record(f"{name}.h", h)
        f_hat = f_hat + quantizer.contribution(h, step.index, patch_nums)
        record(f"{name}.f_hat", f_hat)
        following = steps[step.index + 1]
        next_map = shrink(f_hat, following.patch_num)
        record(f"{name}.next_map", next_map)
        cells = next_map.flatten(2).transpose(1, 2)
        record(f"{name}.next_level", levels[following.index])
        x = llm.embed_tokens(cells, levels[following.index]).repeat(2, 1, 1)
        positions = supplied(cell_positions(following.patch_num, size))
        angles = image_angles(positions + position_ids[:, -1:, None], head_dim)

    for i, (k, v) in enumerate(cache or []):
        record(f"kv.block{i}.k", k)
        record(f"kv.block{i}.v", v)
    record("final.h", h.flatten(2).transpose(1, 2))
    if settings.residual:
        z = llm.residual_condition(hidden, codes.repeat(2, 1, 1))
        record("final.diff.cfg", torch.tensor(steps[-1].guidance, dtype=torch.float64))
        residual = _residual(model, z, noise, settings, residual_guidance(steps[-1]), record)
        record("final.residual", residual)
        h = h + residual.transpose(1, 2).unflatten(-1, (size, size))
    f_hat = f_hat + h
    record("final.f_hat", f_hat)
    image = (model.tokenizer.decode(f_hat) + 1) / 2
    record("image", image)
    return image


def _residual(
    model: Hart,
    z: Tensor,
    noise: Noise,
    settings: SamplingSettings,
    guidance: float,
    record: Record,
) -> Tensor:
    """Denoise one residual per token of the last scale. z (2B, L, C) -> (B, L, Cv)"""
    net = model.transformer.diffloss.net
    tokens, channels = z.shape[1], model.tokenizer.config.z_channels
    z = z.flatten(0, 1)
    record("final.diff.z", z)
    embedded = net.embed_condition(z)
    record("final.diff.embedded", embedded)
    schedule = diffusion_schedule(settings.steps)

    def supplied(array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).reshape(-1, channels).to(z.device)

    x = supplied(noise.residual_start(tokens, channels))
    record("final.diff.init_noise", x)
    for run, index in enumerate(reversed(range(len(schedule)))):
        name = f"final.diff.step{run}"
        t = torch.tensor([int(schedule.timesteps[index])], device=z.device)
        record(f"{name}.t_index", torch.tensor([index]))
        record(f"{name}.t_net", t)
        record(f"{name}.x_t", x)
        output = net(x.repeat(2, 1), t, embedded)
        record(f"{name}.net_out", output)
        output = guide(output, guidance)
        record(f"{name}.model_out", output)
        coefficients = torch.from_numpy(schedule.coefficients(index)).to(z.device)
        step_noise = supplied(noise.residual_step(run, tokens, channels))
        record(f"{name}.noise", step_noise)
        result = denoise(x, output, coefficients, step_noise)
        for key in ("pred_xstart", "mean", "log_variance", "sample"):
            record(f"{name}.{key}", result[key])
        x = result["sample"]
    return x.unflatten(0, (-1, tokens)) * RESIDUAL_SCALE
