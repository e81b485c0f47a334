"""Checkpoints of every family: looked at, loaded, and drawn with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hart_runtime.common.checkpoint import Checkpoint, HartCheckpoint, TwoFiles
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.masking import token_steps
from hart_runtime.common.noise import Noise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart.checkpoint import empty_hart, hart_checks, load_hybrid
from hart_runtime.hart.checkpoint import stored_sets as of_network
from hart_runtime.hart.find import VarCheckpoint
from hart_runtime.hart.generate import Record, generate, generate_classes, ignore
from hart_runtime.hart.mar_checkpoint import empty_mar, load_mar, mar_checks
from hart_runtime.hart.mar_files import MarCheckpoint
from hart_runtime.hart.mar_generate import generate_tokens
from hart_runtime.hart.model import Hart, Mar, Model
from hart_runtime.hart.var_checkpoint import empty_var, load_var, stored_name, var_checks


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Model:
    """Transformer and image tokenizer, as :func:`hart_runtime.hart.checkpoint.load_hybrid`."""
    if isinstance(checkpoint, VarCheckpoint):
        _ = checkpoint.llm_config  # names are compared with tensors
        return load_var(*_files(checkpoint), dtype, checkpoint.num_heads)
    if isinstance(checkpoint, MarCheckpoint):
        return load_mar(*_files(checkpoint), dtype, checkpoint.heads, checkpoint.llm.ema)
    return load_hybrid(_hart(checkpoint), dtype)


def empty(checkpoint: Checkpoint) -> Model:
    """Both without numbers, on the meta device."""
    if isinstance(checkpoint, VarCheckpoint):
        return empty_var(*_files(checkpoint), checkpoint.num_heads)
    if isinstance(checkpoint, MarCheckpoint):
        return empty_mar(*_files(checkpoint), checkpoint.heads, checkpoint.llm.ema)
    return empty_hart(_hart(checkpoint))


def check(checkpoint: Checkpoint) -> None:
    """Compare what weight files there are with the networks; no values are read. Raises InputError."""
    for check_network in checks(checkpoint).values():
        check_network()


def checks(checkpoint: Checkpoint) -> dict[str, Callable[[], None]]:
    """The same by network; raises InputError where a configuration cannot be used."""
    if isinstance(checkpoint, VarCheckpoint):
        return var_checks(*_files(checkpoint), checkpoint.num_heads)
    if isinstance(checkpoint, MarCheckpoint):
        return mar_checks(*_files(checkpoint), checkpoint.heads, checkpoint.llm.ema)
    return hart_checks(_hart(checkpoint))


def stored_sets(checkpoint: Checkpoint) -> tuple[str, ...]:
    """As :func:`hart_runtime.hart.checkpoint.stored_sets`."""
    names = [name for name, _ in empty(checkpoint).transformer.named_parameters()]
    stored = stored_name if isinstance(checkpoint, VarCheckpoint) else str
    return of_network(checkpoint.llm, [stored(name) for name in names])


def draw(
    model: Model,
    inputs: Sequence[Tensor],
    noise: Noise,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...] | None = None,
    record: Record = ignore,
    extent: int | None = None,
) -> Tensor:
    """The reference loop on what an exported drawing is given; see
    :func:`hart_runtime.hart.generate.generate`.

    Args:
        inputs: in the order of the first graph's: text features and their mask, or labels.
    """
    if isinstance(model, Hart):
        features, mask = inputs
        return generate(model, features, mask, noise, settings, patch_nums, record, extent=extent)
    (labels,) = inputs
    if isinstance(model, Mar):
        iterations = settings.iterations or model.transformer.config.tokens
        steps = token_steps(
            model.transformer.config.tokens, iterations, settings.guidance, settings.guidance_schedule
        )
        schedule = diffusion_schedule(settings.steps)
        return generate_tokens(model, labels, noise, steps, schedule, settings.temperature, record)
    return generate_classes(model, labels, noise, settings, record)


def _files(checkpoint: TwoFiles) -> tuple[Path, Path]:
    return checkpoint.transformer_file, checkpoint.tokenizer_file


def _hart(checkpoint: Checkpoint) -> HartCheckpoint:
    assert isinstance(checkpoint, HartCheckpoint)
    return checkpoint
