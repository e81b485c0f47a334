"""How good pictures of the demo are, see :mod:`hart_runtime.hart.demo.report`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from hart_runtime.common.checkpoint import Checkpoint
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.pyramids import pyramid_of
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.demo.scenes import Scene
from hart_runtime.hart.frechet import Doubles, Normal, distance
from hart_runtime.hart.generate import generate
from hart_runtime.hart.model import ClassModel, Hart, Mar
from hart_runtime.hart.tokenizer import ImageTokenizer

BATCH = 25
Array = NDArray[np.float32]


@torch.inference_mode()
def reconstruction(tokenizer: ImageTokenizer, drawn: Array) -> dict[str, float]:
    """PSNR in dB of both decoding paths."""
    squared = np.zeros(2)
    for start in range(0, len(drawn), BATCH):
        images = torch.from_numpy(drawn[start : start + BATCH]).permute(0, 3, 1, 2) * 2 - 1
        tokens = tokenizer.encode(images)
        for i, decode in enumerate((tokenizer.decode_discrete, tokenizer.decode_continuous)):
            squared[i] += ((decode(tokens) - images) / 2).square().mean((1, 2, 3)).sum().item()
    discrete, continuous = -10 * np.log10(squared / len(drawn))
    return {
        "PSNR of the discrete path, dB": float(discrete),
        "PSNR of the continuous path, dB": float(continuous),
    }


@torch.inference_mode()
def generate_scenes(
    checkpoint: Checkpoint,
    model: Hart,
    scenes: list[Scene],
    settings: SamplingSettings,
    size: int | None = None,
) -> Array:
    """Draw the captions of scenes with the reference model, (N, H, W, 3) in [0, 1].

    Args:
        size: pixels along a side; the checkpoint's if left out.
    """
    llm, patch_nums = checkpoint.llm_config, checkpoint.llm_config.patch_nums
    if size is not None:
        patch_nums = pyramid_of(llm, checkpoint.tokenizer_config, size)
    assert checkpoint.text_encoder is not None  # the demo has one
    text = load_text_encoder(checkpoint.text_encoder)
    vocabulary = Tokenizer.from_file(str(checkpoint.text_encoder.folder / "tokenizer.json"))
    prompts = PromptTokenizer(vocabulary, model.transformer.config.context_token)
    parts = []
    for start in track(range(0, len(scenes), BATCH), "generating", transient=True):
        part = scenes[start : start + BATCH]
        ids, mask = (torch.from_numpy(a) for a in prompts([scene.caption() for scene in part]))
        noise = SeededNoise(range(start, start + len(part)))
        features, extent = text(ids, mask), llm.patch_nums[-1]
        pixels = generate(model, features, mask, noise, settings, patch_nums, extent=extent)
        parts.append(pixels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def draw_labels(model: ClassModel | Mar, labels: list[int], seed: int, settings: SamplingSettings) -> Array:
    """Draw classes with the reference model, seeds from ``seed`` on; (N, H, W, 3) in [0, 1]."""
    noise = SeededNoise(range(seed, seed + len(labels)))
    return checkpoints.draw(model, [torch.tensor(labels)], noise, settings).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def encoder_features(tokenizer: ImageTokenizer, images: Array) -> Doubles:
    """Means and spreads over all cells of each channel of the tokenizer's continuous latent, (N, 2 * Cv)."""
    parts = []
    for start in range(0, len(images), BATCH):
        f = tokenizer.latent(torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2) * 2 - 1)
        parts.append(torch.cat([f.mean((2, 3)), f.std((2, 3))], dim=1))
    return torch.cat(parts).double().numpy()


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
    return distance(Normal.of(reference / scale), Normal.of(other / scale))


def resized(images: Array, size: int) -> Array:
    """Pictures with another number of pixels, through 8 bits, bicubic; (N, H, W, 3) in [0, 1]."""
    bytes_ = (images.clip(0, 1) * 255).astype(np.uint8)
    found = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in bytes_]
    return np.stack([np.asarray(image, np.float32) / 255 for image in found])


def sheet(images: Array) -> Image.Image:
    """Pictures side by side, eight a row; (N, H, W, 3) in [0, 1]."""
    rows = [np.concatenate(list(images[i : i + 8]), axis=1) for i in range(0, len(images) - 7, 8)]
    return Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
