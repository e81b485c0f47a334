"""The PyTorch reference beside the bundle: same weights, same seeds, same device, turn by turn."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.bench import EAGER
from hart_runtime.bench.samples import Samples
from hart_runtime.bench.workload import begin, draw_from
from hart_runtime.common.checkpoint import LLM, TOKENIZER, Checkpoint
from hart_runtime.common.install import require
from hart_runtime.common.noise import SeededNoise
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.origin import exported_from
from hart_runtime.runtime.pipeline import Pipeline, to_images

if TYPE_CHECKING:
    from hart_runtime.hart.model import Model

BUNDLE = "bundle"
Draw = Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Comparison:
    """One reference, measured in turns with the bundle; the text encoder runs in neither."""

    name: str
    seconds: Samples
    ours: Samples
    """The bundle, in the same rounds."""
    ratio: Samples
    """Reference time / bundle time of each round: above 1, the bundle is faster."""
    first: float
    """Seconds of the reference's first picture, compilation included."""
    psnr: float | None
    """dB between both pictures; None if they are equal."""


def compare_with(
    references: Sequence[str],
    pipeline: Pipeline,
    checkpoint: Checkpoint,
    iterations: int,
    warmup: int,
    threads: int | None,
    progress: Callable[[str], None],
) -> list[Comparison]:
    """Draw one picture with the bundle and with each reference, ``iterations`` times in turns.

    Args:
        checkpoint: as :func:`find_reference` returned it.
        warmup: rounds that are not counted, the first pictures among them.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    given = begin(pipeline, 1)
    model = _load(pipeline, checkpoint)
    draws = {BUNDLE: lambda: draw_from(pipeline, given)}
    for name in references:
        chosen = model if name == EAGER else _compiled(model)
        draws[name] = _reference(chosen, pipeline, given)
    first, pictures = {}, {}
    for name, draw in draws.items():
        progress(f"{name}, first picture")
        first[name], (pictures[name],) = _timed(draw)
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for turn in range(1 - warmup, iterations):
        for name, draw in draws.items():
            progress(f"{name} in turns")
            taken, _ = _timed(draw)
            if turn >= 0:
                seconds[name].append(taken)
    ours = seconds[BUNDLE]
    return [
        Comparison(
            name,
            Samples.of(seconds[name]),
            Samples.of(ours),
            Samples.of([theirs / mine for theirs, mine in zip(seconds[name], ours, strict=True)]),
            first[name],
            _psnr(pictures[BUNDLE], pictures[name]),
        )
        for name in references
    ]


def find_reference(bundle: Bundle, given: Path | None) -> Checkpoint:
    """The checkpoint that a bundle was exported from: the one given, or the demo's.

    Raises:
        InputError: torch is not there, or the weight files are not those that were exported.
    """
    require("`against`", "export", "torch", "safetensors")
    from hart_runtime.hart.demo import DEMOS
    from hart_runtime.hart.find import finder

    looked_for = finder(bundle.manifest.checkpoint)
    return exported_from(bundle, given, DEMOS.values(), looked_for, networks=(LLM, TOKENIZER))


def _load(pipeline: Pipeline, checkpoint: Checkpoint) -> Model:
    """The reference model on the bundle's device."""
    import torch

    from hart_runtime.hart.checkpoints import load

    device = pipeline.backend.device
    # Autocast would convert float32 weights again in every call, and slow the reference down.
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = load(checkpoint, dtype)
    for part in model:
        part.to(device)
    return model


def _compiled(model: Model) -> Model:
    """The same weights in modules that torch.compile has taken over."""
    from hart_runtime.hart.model import Var

    shared: dict[int, Any] = {id(p): p for part in model for p in part.parameters()}
    copied = copy.deepcopy(model, shared)
    copied.transformer.compile(dynamic=True)
    if not isinstance(copied, Var):
        copied.transformer.diffloss.net.compile(dynamic=True)
    copied.tokenizer.decoder.compile()
    return copied


def _reference(model: Model, pipeline: Pipeline, given: Mapping[str, NDArray[Any]]) -> Draw:
    """What a drawing begins with to pixels, with the reference loop: half-precision autocast on CUDA."""
    import torch

    from hart_runtime.hart import checkpoints

    device, manifest = pipeline.backend.device, pipeline.bundle.manifest
    spec = manifest.model
    inputs = [torch.from_numpy(array).to(device) for array in given.values()]
    count = len(next(iter(given.values())))

    def draw() -> list[Image.Image]:
        noise = SeededNoise(range(count))
        with torch.autocast("cuda", torch.float16, enabled=device != "cpu"):
            pixels = checkpoints.draw(
                model, inputs, noise, manifest.sampling, spec.patch_nums, extent=spec.reach
            )
        return to_images(pixels.float().cpu().numpy())

    return draw


def _timed(draw: Draw) -> tuple[float, list[Image.Image]]:
    """Seconds until the pixels are on the host, which waits for every graph and kernel."""
    start = time.perf_counter()
    images = draw()
    return time.perf_counter() - start, images


def _psnr(one: Image.Image, other: Image.Image) -> float | None:
    a, b = (np.asarray(image, np.float64) for image in (one, other))
    error = float(np.square(a - b).mean())
    return 10 * math.log10(255**2 / error) if error else None
