"""The reference loop: text features, or classes, to pixels, scale after scale, in PyTorch.

All families share it: they differ in what begins a scale, and in how the last one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.noise import Noise
from hart_runtime.common.pruning import sources
from hart_runtime.common.schedule import ScaleStep, cell_positions, residual_guidance, scale_steps
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.diffusion import RESIDUAL_SCALE, denoise, guide
from hart_runtime.hart.editing import Kept
from hart_runtime.hart.model import ClassModel, Hart, HybridModel, ScaleModel, Var
from hart_runtime.hart.pruning import Branches, run_pruned
from hart_runtime.hart.quantizer import shrink
from hart_runtime.hart.rope import Rotation, context_angles, image_angles
from hart_runtime.hart.sampling import draw_codes, guide_logits, smooth_codes, truncate, windows
from hart_runtime.hart.transformer import Cache, Pair, ScaleTransformer, attention

Record = Callable[[str, Tensor], None]
"""Called with the name and value of every tensor of the trajectory."""


def ignore(name: str, value: Tensor) -> None:
    pass


def _recorded(scale: int) -> str:
    """What begins the names of a scale's tensors."""
    return f"scale{scale}"


@torch.inference_mode()
def generate(
    model: Hart,
    features: Tensor,
    mask: Tensor,
    noise: Noise,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...] | None = None,
    record: Record = ignore,
    kept: Kept | None = None,
    extent: int | None = None,
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
        kept: what of given pictures stays.
        extent: side of the map whose extent positions are spread over; by default the pyramid's last, as
            the published code has it.

    Returns:
        (B, 3, H, W) pixels in [0, 1].
    """
    llm = model.transformer
    patch_nums = patch_nums or llm.config.patch_nums
    extent, head_dim = extent or patch_nums[-1], llm.config.head_dim
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
    first = (context.tokens + levels[0], context_angles(position_ids, head_dim))

    def following(cells: Tensor, scale: int) -> Inputs:
        record(f"{_recorded(scale - 1)}.next_level", levels[scale])
        x = llm.embed_tokens(cells, levels[scale]).repeat(2, 1, 1)
        places = torch.from_numpy(cell_positions(patch_nums[scale], extent)).to(x.device)
        return x, image_angles(places + position_ids[:, -1:, None], head_dim)

    condition = Condition(first, context.block_condition, context.head_condition, following)
    return _draw(model, condition, noise, settings, patch_nums, record, kept)


@torch.inference_mode()
def generate_classes(
    model: ClassModel,
    labels: Tensor,
    noise: Noise,
    settings: SamplingSettings,
    record: Record = ignore,
    kept: Kept | None = None,
) -> Tensor:
    """Draw a picture of each class; the rest as for :func:`generate`.

    Args:
        labels: (B,) int64; ``num_classes`` draws of none.
    """
    transformer = model.transformer
    record("label", labels)
    condition = transformer.condition(labels)
    modulations = transformer.modulations(condition)
    record("cond", condition)
    record("modulations", modulations)

    def following(cells: Tensor, scale: int) -> Inputs:
        return (transformer.embed_tokens(cells, scale).repeat(2, 1, 1),)

    first = (transformer.start(condition),)
    asked = Condition(first, modulations, condition, following)
    return _draw(model, asked, noise, settings, transformer.config.patch_nums, record, kept)


Inputs = tuple[Tensor, ...]
"""What the transformer takes of a scale's tokens: (2B, L, C), and their angles where it rotates them."""


class Condition(NamedTuple):
    """What is drawn, in the words of a transformer."""

    first: Inputs
    blocks: Tensor
    """What modulates the blocks."""
    head: Tensor
    """(2B, C): what modulates the norm before the vocabulary projection."""
    following: Callable[[Tensor, int], Inputs]
    """Inputs of a later scale, of its cells of f_hat (B, n * n, Cv) and its index."""


def _draw(
    model: ScaleModel,
    condition: Condition,
    noise: Noise,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...],
    record: Record,
    kept: Kept | None,
) -> Tensor:
    """The loop over scales, the residual of a hybrid tokenizer, and the decoder."""
    transformer, quantizer = model.transformer, model.tokenizer.quantize
    hybrid = model.tokenizer.config.hybrid
    steps = scale_steps(patch_nums, settings, len(quantizer.embedding.weight), hybrid)
    batch, size = len(condition.head) // 2, patch_nums[-1]
    device = condition.head.device

    def supplied(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    f_hat = torch.zeros(batch, model.tokenizer.config.z_channels, size, size, device=device)
    inputs, blocks, head, cache = condition.first, condition.blocks, condition.head, None
    memory = None

    for step in steps:
        name = _recorded(step.index)
        for value, what in zip(inputs, (".x_in", ".angles"), strict=False):
            record(f"{name}{what}", value)
        if not step.guided:  # the unconditional half is left out from here on
            inputs = tuple(value[:batch] for value in inputs)
            blocks, head = blocks[:batch], head[:batch]
            cache = _first(cache or [], batch)
            memory = memory and memory.first(batch)
        past = cache[0][0].shape[1] if cache else 0
        if step.kept is None and not step.remembered:
            hidden, cache = transformer(*inputs, blocks, cache)
        else:
            assert isinstance(transformer, ScaleTransformer)
            hidden, cache, memory = _pruned(transformer, inputs, step, cache, memory, record)
        record(f"{name}.hidden", hidden)
        for i, pair in enumerate(cache):
            for kind, tokens in zip(("key", "value"), pair, strict=True):
                record(f"{name}.block{i}.new_{kind}", tokens[:, past:])
        # Of a text the last position, padded or not, predicts scale 0.
        raw = transformer.logits(hidden, head)[:, -step.num_tokens :]
        record(f"{name}.logits_raw", raw)
        logits = guide_logits(raw, step.guidance) if step.guided else raw
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
        if hybrid and step is steps[-1]:
            break
        if kept is not None:
            record(f"{name}.h_drawn", h)
            h = kept.in_map(h, step.index)
        record(f"{name}.h", h)
        f_hat = f_hat + quantizer.contribution(h, step.index, patch_nums, quantizer.phi_on_last)
        record(f"{name}.f_hat", f_hat)
        if step is steps[-1]:
            break
        next_map = shrink(f_hat, patch_nums[step.index + 1])
        record(f"{name}.next_map", next_map)
        inputs = condition.following(next_map.flatten(2).transpose(1, 2), step.index + 1)

    for i, (k, v) in enumerate(cache or []):
        record(f"kv.block{i}.k", k)
        record(f"kv.block{i}.v", v)
    if not isinstance(model, Var):
        record("final.h", h.flatten(2).transpose(1, 2))
        if settings.residual:
            z = model.transformer.residual_condition(hidden, codes.repeat(len(hidden) // batch, 1, 1))
            record("final.diff.cfg", torch.tensor(steps[-1].guidance, dtype=torch.float64))
            residual = _residual(model, z, noise, settings, steps[-1], record)
            record("final.residual", residual)
            h = h + residual.transpose(1, 2).unflatten(-1, (size, size))
        f_hat = f_hat + h
        if kept is not None:
            f_hat = kept.in_latent(f_hat)
    record("final.f_hat", f_hat)
    image = (model.tokenizer.decode(f_hat) + 1) / 2
    record("image", image)
    return image


@dataclass(frozen=True)
class _Memory:
    """What pruned scales receive of an earlier one."""

    side: int
    added: Branches

    def first(self, rows: int) -> _Memory:
        """That of the first rows."""
        return _Memory(self.side, _first(self.added, rows))


def _first(pairs: Sequence[Pair], rows: int) -> list[Pair]:
    return [(one[:rows], other[:rows]) for one, other in pairs]


def _pruned(
    transformer: ScaleTransformer,
    inputs: Inputs,
    step: ScaleStep,
    cache: Cache | None,
    memory: _Memory | None,
    record: Record,
) -> tuple[Tensor, list[Pair], _Memory | None]:
    """The transformer at a scale that is remembered, or of whose tokens only some take part."""
    x, angles = inputs
    places = torch.zeros(1, x.shape[1], dtype=torch.long, device=x.device)  # nothing is taken from there
    taken = [(x.new_zeros(len(x), 1, x.shape[2]),) * 2 for _ in transformer.blocks]
    if step.kept is not None:
        assert memory is not None
        places = torch.from_numpy(sources(memory.side, step.patch_num)).to(x.device)
        taken = memory.added

    def noted(name: str, value: Tensor) -> None:
        record(f"{_recorded(step.index)}.{name}", value)

    hidden, cache, added = run_pruned(
        transformer.blocks,
        x,
        Rotation.of(angles),
        cache,
        step.kept or x.shape[1],
        taken,
        places,
        attention,
        noted,
    )
    return hidden, cache, _Memory(step.patch_num, added) if step.remembered else memory


def _residual(
    model: HybridModel,
    z: Tensor,
    noise: Noise,
    settings: SamplingSettings,
    last: ScaleStep,
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
        output = net(x.repeat(2, 1) if last.guided else x, t, embedded)
        record(f"{name}.net_out", output)
        if last.guided:
            conditional, unconditional = output.chunk(2)
            output = guide(conditional, unconditional, residual_guidance(last))
        record(f"{name}.model_out", output)
        coefficients = torch.from_numpy(schedule.coefficients(index)).to(z.device)
        step_noise = supplied(noise.residual_step(run, tokens, channels))
        record(f"{name}.noise", step_noise)
        result = denoise(x, output, coefficients, step_noise)
        for key in ("pred_xstart", "mean", "log_variance", "sample"):
            record(f"{name}.{key}", result[key])
        x = result["sample"]
    return x.unflatten(0, (-1, tokens)) * RESIDUAL_SCALE
