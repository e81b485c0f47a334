"""Measures the demo: ``python -m hart_runtime.hart.demo.report``.

Reconstruction of both decoding paths, generation of held-out prompts judged by the rule-based
checker, and how far generated pictures are from drawn ones with and without the residual.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from hart_runtime.common.checkpoint import Checkpoint, find_checkpoint
from hart_runtime.common.console import PATH, command, sampling_options
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings, check_ranges
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.hart.checkpoint import load_hart, load_text_encoder
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.hart.demo.checker import Verdict, look
from hart_runtime.hart.demo.draw import draw_scene
from hart_runtime.hart.demo.scenes import Scene, split_scenes
from hart_runtime.hart.generate import generate
from hart_runtime.hart.model import Hart

BATCH = 25
Array = NDArray[np.float32]
Doubles = NDArray[np.float64]


@command()
@click.option("--checkpoint", type=PATH, default=DEMO_CHECKPOINT)
@click.option("--split", type=click.Choice(["held-out", "training"]), default="held-out", show_default=True)
@click.option(
    "--images",
    type=click.IntRange(2, 10_000),
    default=200,
    show_default=True,
    help="Pictures to judge.",
)
@sampling_options("the checkpoint's")
@click.option("--grid", type=PATH, help="Also write a sheet of the first 40 pictures.")
@click.option("--output", type=PATH, help="Also write the numbers as JSON.")
def main(
    checkpoint: Path,
    split: str,
    images: int,
    grid: Path | None,
    output: Path | None,
    **overrides: float | bool | None,
) -> None:
    """Measure a demo checkpoint."""
    found = find_checkpoint(checkpoint)
    model = load_hart(found)
    training, held_out = split_scenes()
    scenes = held_out if split == "held-out" else training
    rng = np.random.default_rng(7)
    chosen = [scenes[i] for i in rng.permutation(np.resize(np.arange(len(scenes)), images))]
    drawn = np.stack([draw_scene(scene, rng) for scene in chosen])
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = replace(found.sampling, **given)  # type: ignore[arg-type]
    check_ranges(settings, found.tokenizer_config)

    numbers: dict[str, float] = {}
    numbers |= reconstruction(model, drawn)
    others = np.stack([draw_scene(scene, rng) for scene in chosen])
    numbers["Frechet distance of two drawn sets"] = frechet(features(drawn), features(others))
    for name, residual in (("with residual", True), ("without residual", False)):
        if given.get("residual", residual) != residual:
            continue
        start = time.perf_counter()
        pictures = generate_scenes(found, model, chosen, replace(settings, residual=residual))
        seconds = (time.perf_counter() - start) / len(chosen)
        verdicts = [look(picture) for picture in pictures]
        right = [v.matches(s) for v, s in zip(verdicts, chosen, strict=True)]
        numbers[f"{name}: colour, shape and background right, %"] = 100 * float(np.mean(right))
        numbers[f"{name}: Frechet distance"] = frechet(features(drawn), features(pictures))
        numbers[f"{name}: seconds per picture"] = seconds
        if residual:
            _explain(chosen, verdicts, right)
            if grid:
                _sheet(pictures[:40]).save(grid)
    for name, value in numbers.items():
        click.echo(f"{name:<60}{value:10.3f}")
    if output:
        output.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def reconstruction(model: Hart, drawn: Array) -> dict[str, float]:
    """PSNR in dB of both decoding paths of the tokenizer."""
    squared = np.zeros(2)
    for start in range(0, len(drawn), BATCH):
        images = torch.from_numpy(drawn[start : start + BATCH]).permute(0, 3, 1, 2) * 2 - 1
        tokens = model.tokenizer.encode(images)
        for i, decode in enumerate((model.tokenizer.decode_discrete, model.tokenizer.decode_continuous)):
            squared[i] += ((decode(tokens) - images) / 2).square().mean((1, 2, 3)).sum().item()
    discrete, continuous = -10 * np.log10(squared / len(drawn))
    return {
        "PSNR of the discrete path, dB": float(discrete),
        "PSNR of the continuous path, dB": float(continuous),
    }


@torch.inference_mode()
def generate_scenes(
    checkpoint: Checkpoint, model: Hart, scenes: list[Scene], settings: SamplingSettings
) -> Array:
    """Draw the captions of scenes with the reference model, (N, H, W, 3) in [0, 1]."""
    assert checkpoint.text_encoder is not None  # the demo has one
    text = load_text_encoder(checkpoint.text_encoder)
    vocabulary = Tokenizer.from_file(str(checkpoint.text_encoder.folder / "tokenizer.json"))
    prompts = PromptTokenizer(vocabulary, model.transformer.config.context_token)
    parts = []
    for start in track(range(0, len(scenes), BATCH), "generating", transient=True):
        part = scenes[start : start + BATCH]
        ids, mask = (torch.from_numpy(a) for a in prompts([scene.caption() for scene in part]))
        noise = SeededNoise(range(start, start + len(part)))
        pixels = generate(model, text(ids, mask), mask, noise, settings)
        parts.append(pixels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def features(images: Array) -> Doubles:
    """Fixed features of pictures: means and spreads of seeded random filters at two sizes."""
    filters = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    filters = filters - filters.mean((2, 3), keepdim=True)  # texture, not colour
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    columns: list[Tensor] = [x.mean((2, 3)), x.std((2, 3))]
    for _ in range(2):
        response = torch.nn.functional.conv2d(x, filters)
        columns += [response.abs().mean((2, 3)), response.std((2, 3))]
        x = torch.nn.functional.avg_pool2d(x, 2)
    return torch.cat(columns, dim=1).double().numpy()


def frechet(reference: Doubles, other: Doubles) -> float:
    """Frechet distance of two feature sets, in units of the reference's spread."""
    scale = reference.std(0)
    a, b = reference / scale, other / scale
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = float(np.square(a.mean(0) - b.mean(0)).sum())
    return gap + float(np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _explain(scenes: list[Scene], verdicts: list[Verdict], right: list[bool]) -> None:
    wrong: Counter[str] = Counter()
    for scene, verdict, ok in zip(scenes, verdicts, right, strict=True):
        if not ok:
            wrong[f"{scene.caption()} -> {verdict}"] += 1
    for line, count in wrong.most_common(10):
        click.echo(f"wrong {count}x: {line}")


def _sheet(images: Array) -> Image.Image:
    rows = [np.concatenate(list(images[i : i + 8]), axis=1) for i in range(0, len(images) - 7, 8)]
    return Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
