"""One optimisation run of a demo's training: AdamW on losses of seeded steps, resumable, averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

EMA_DECAY = 0.995
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """One optimisation run."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    horizon: int | None = None
    """Steps the learning rate's cosine is laid out for, where the stage stops before its end."""


@dataclass(frozen=True)
class TransformerStage(Stage):
    """See :func:`hart_runtime.hart.losses.transformer_loss` for ``balance`` and ``residual_share``."""

    weight_decay: float = 0.02
    balance: float = 0.0
    residual_share: float = 1.0
    fine_scenes: float = 1.0
    """How much more often than others stars are seen, and small things: they take the longest."""


def optimise(
    model: nn.Module, stage: Stage, batch_loss: Callable[[int], dict[str, Tensor]], work: Path
) -> nn.Module:
    """AdamW with warm-up and cosine decay; returns an exponential average of the weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    averaged = copy.deepcopy(model)
    state_file = work / f"{stage.name}.pt"
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
        }
        partial = state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(state_file)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    smoothed: dict[str, float] = {}
    with Progress(*columns) as progress, (work / f"{stage.name}.log").open("a") as log:
        task = progress.add_task(stage.name, total=stage.steps, completed=first, losses="")
        for step in range(first, stage.steps):
            warm_up = min(1.0, (step + 1) / 100)
            decay = 0.5 * (1 + math.cos(math.pi * step / (stage.horizon or stage.steps)))
            for group in optimiser.param_groups:
                group["lr"] = stage.learning_rate * warm_up * max(decay, 0.02)
            losses = batch_loss(step)
            optimiser.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            keep = min(EMA_DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, value in zip(
                    averaged.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    mean.lerp_(value, 1 - keep)
            for name, value in losses.items():
                smoothed[name] = 0.95 * smoothed.get(name, value.item()) + 0.05 * value.item()
            text = ", ".join(f"{name} {value:.4f}" for name, value in smoothed.items())
            progress.update(task, advance=1, losses=text)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
                save(step + 1)
                print(f"step {step + 1}: {text}", file=log, flush=True)
    return averaged


def initialise(model: nn.Module, depth: int) -> None:
    """Small residual branches, zero-initialised modulation: stable from the first step."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
            if name.endswith(("attn.proj", "down_proj", "o_proj", "ffn.fc2", "mlp.fc2")):
                with torch.no_grad():
                    part.weight.div_(math.sqrt(2 * depth))
            if "adaLN_modulation" in name or name.endswith(("final_layer.linear", "ada_lin.1")):
                nn.init.zeros_(part.weight)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.5)
