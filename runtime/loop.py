"""The loop over scales and denoising steps, the same for every backend.

The host only schedules and supplies random numbers. :func:`hart_runtime.hart.generate.generate` is
the same loop over the reference model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import RunError
from hart_runtime.common.noise import Noise
from hart_runtime.common.schedule import (
    ScaleStep,
    downsample_matrix,
    residual_guidance,
    scale_steps,
    upsample_matrix,
)
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime import contract, stages
from hart_runtime.runtime.backend import Backend, Tensor
from hart_runtime.runtime.bundle import Manifest

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Advance:
    """What a watcher is told when a scale or a denoising step is done."""

    stage: str
    """SCALE, RESIDUAL or DECODER of :mod:`hart_runtime.runtime.stages`."""
    index: int
    total: int
    decode: Callable[[], Array]
    """Decodes the picture as it stands, (B, 3, H, W) in [0, 1]."""


Watch = Callable[[Advance], None]


@dataclass
class Drawing:
    """Result of one batch."""

    images: Array
    """(B, 3, H, W) in [0, 1]."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage, in the order they ran."""


def draw(
    backend: Backend,
    manifest: Manifest,
    features: Tensor | Array,
    mask: NDArray[np.bool_],
    noise: Noise,
    settings: SamplingSettings,
    watch: Watch = lambda _: None,
    record: Callable[[str, Tensor], None] = lambda *_: None,
) -> Drawing:
    """Draw a batch of pictures from text features (B, T, D) and their mask (B, T).

    ``record`` receives intermediate device tensors under the names of the recorded runs.

    Raises:
        RunError: a latent or a pixel is not finite, or a picture came out in one flat colour.
    """
    clock = _Clock()
    backend.prepare(len(mask), settings)
    model, graphs = manifest.model, manifest.graphs
    batch, size, channels = len(mask), model.patch_nums[-1], model.latent_channels
    steps = scale_steps(model.patch_nums, settings, model.vocab_size)
    schedule = diffusion_schedule(settings.steps)
    to_check: list[tuple[str, Tensor]] = []

    context = backend.run(contract.CONTEXT, {"features": features, "mask": mask})
    clock.lap(stages.CONTEXT)
    x, angles = context["x"], context["angles"]
    modulated = graphs[contract.TRANSFORMER].reads("block_condition")
    condition = {"block_condition": context["text_condition"]} if modulated else {}
    f_hat: Tensor = np.zeros((batch, channels, size, size), np.float32)
    cache = _empty_cache(manifest, batch)
    h: Tensor = None
    none = np.zeros((batch, size * size, channels), np.float32)

    def decode(latents: Tensor) -> Array:
        # One by one: the decoder's full-resolution activations are the largest of all.
        decoded = [
            backend.run(contract.DECODER, {"f_hat": latent})["image"] for latent in backend.split(latents)
        ]
        return np.concatenate([backend.to_host(image) for image in decoded])

    def finished(residual: Tensor) -> Tensor:
        """The latent with the last scale's codes and a residual on top."""
        return backend.run(contract.LATENT, {"f_hat": f_hat, "h": h, "residual": residual})["f_hat_out"]

    def preview() -> Array:
        return decode(finished(none) if step is steps[-1] else f_hat)

    for step in steps:
        name = f"scale{step.index}"
        record(f"{name}.x_in", x)
        outputs = backend.run(contract.TRANSFORMER, {"x": x, "angles": angles, **condition, **cache})
        if step is steps[0]:
            outputs = backend.run(
                contract.UNCONDITIONAL, {contract.TEXT + key: value for key, value in outputs.items()}
            )
            if modulated:
                condition = {"block_condition": context["block_condition"]}  # of both halves
        hidden = outputs.pop("hidden")
        cache = {contract.PAST + key: value for key, value in outputs.items()}
        record(f"{name}.hidden", hidden)
        clock.lap(stages.transformer_stage(step.index))
        sampled = backend.run(
            contract.SAMPLE,
            {
                "hidden": hidden,
                "head_condition": context["head_condition"],
                "guidance": np.array(step.guidance, np.float32),
                "top_k": np.array([step.top_k], np.int64),
                "top_p": np.array(step.top_p or 1.0, np.float32),
                "uniform": _as_map(noise.uniform(step.index, step.num_tokens), step),
            },
        )
        record(f"{name}.idx", sampled["index"])
        h = sampled["codes"]
        if settings.smooth:
            exponential = noise.exponential(step.index, step.num_tokens, model.vocab_size)
            h = backend.run(
                contract.SMOOTH,
                {
                    "logits": sampled["logits"],
                    "exponential": _as_map(exponential, step),
                    "logit_gain": np.array(step.logit_gain, np.float32),
                    "temperature": np.array(step.temperature, np.float32),
                },
            )["h"]
        if step is not steps[-1]:
            following = steps[step.index + 1]
            advanced = backend.run(
                contract.NEXT_SCALE,
                {
                    "h": h,
                    "f_hat": f_hat,
                    "scale": np.array([step.index], np.int64),
                    "up": upsample_matrix(step.patch_num, size),
                    "down": downsample_matrix(size, following.patch_num),
                    "offset": context["offset"],
                },
            )
            f_hat, x, angles = advanced["f_hat_out"], advanced["x"], advanced["angles"]
            record(f"{name}.f_hat", f_hat)
            to_check.append((f"scale {step.index}", f_hat))
        clock.lap(stages.sampling_stage(step.index))
        watch(Advance(stages.SCALE, step.index, len(steps), preview))
        clock.restart()

    del cache, outputs  # its memory is the decoder's from here on
    to_check.append(("last scale", h))
    residual = none
    if settings.residual:
        inputs = {"hidden": hidden, "codes": sampled["codes"]}
        embedded = backend.run(contract.RESIDUAL_CONDITION, inputs)["embedded"]
        guidance = np.array(residual_guidance(steps[-1]), np.float32)
        residual = noise.residual_start(size * size, channels)
        for run, index in enumerate(reversed(range(len(schedule)))):
            record(f"final.diff.step{run}.x_t", residual)
            residual = backend.run(
                contract.RESIDUAL_STEP,
                {
                    "x": residual,
                    "embedded": embedded,
                    "timestep": schedule.timesteps[index : index + 1],
                    "coefficients": schedule.coefficients(index),
                    "guidance": guidance,
                    "noise": noise.residual_step(run, size * size, channels),
                },
            )["x_out"]
            to_check.append((stages.residual_stage(run), residual))
            clock.lap(stages.residual_stage(run))
            watch(Advance(stages.RESIDUAL, run, len(schedule), preview))
            clock.restart()
    f_hat = finished(residual)
    record("final.f_hat", f_hat)
    images = decode(f_hat)
    clock.lap(stages.DECODER)
    _refuse_broken(backend, to_check, images)
    watch(Advance(stages.DECODER, 0, 1, lambda: images))
    return Drawing(images, clock.seconds)


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def restart(self) -> None:
        """Leave out what happened since the last lap: the watcher's own time."""
        self.last = time.perf_counter()


def _as_map(values: Array, step: ScaleStep) -> Array:
    """(B, n * n, ...) -> (B, n, n, ...)"""
    return values.reshape(len(values), step.patch_num, step.patch_num, *values.shape[2:])


def _empty_cache(manifest: Manifest, batch: int) -> dict[str, Any]:
    """That of the text, which only the conditional half runs."""
    return {
        spec.name: np.zeros((batch, 0, manifest.model.embed_dim), spec.dtype)
        for spec in manifest.graphs[contract.TRANSFORMER].inputs
        if spec.name.startswith(contract.PAST)
    }


def _refuse_broken(backend: Backend, to_check: list[tuple[str, Tensor]], images: Array) -> None:
    """Latents are only looked at after the last graph, so that no stage waits for the host."""
    for stage, tensor in to_check:
        if not np.isfinite(backend.to_host(tensor)).all():
            raise RunError(f"{stage}: the latent holds NaN or infinity, there is no picture")
    if not np.isfinite(images).all():
        raise RunError("decoder: the picture holds NaN or infinity")
    for number, image in enumerate(images):
        if image.min() == image.max():
            raise RunError(f"decoder: picture {number} is one flat colour ({image.min():.3f})")
