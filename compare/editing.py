"""How well the demo edits: ``python -m hart_runtime.compare.editing --engine engines/demo``.

A shape is replaced by another one in held-out pictures, by the reference model and by the bundle, with the
same seeds; and what the image tokenizer keeps of these pictures is measured through the exported encoder.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import InputError
from hart_runtime.common.install import require
from hart_runtime.hart.demo.replacing import Replacement, rates, replacements
from hart_runtime.runtime.options import bundle_option

if TYPE_CHECKING:
    from hart_runtime.hart.demo.draw import Array
    from hart_runtime.runtime.pictures import Source
    from hart_runtime.runtime.pipeline import Pipeline

AT_ONCE = 8
ROWS, COLOURS = 3, 128
"""Of a strip."""


@command()
@bundle_option
@click.option(
    "--images", type=click.IntRange(2, 1000), default=200, show_default=True, help="Pictures to judge."
)
@click.option("--anew", type=click.IntRange(0, 5), default=0, show_default=True, help="As of hart-run.")
@click.option("--reference/--no-reference", default=True, help="Whether the reference model does it, too.")
@click.option("--strip", type=PATH, help="Also write a strip of pictures, reconstructed and edited.")
@click.option("--output", type=PATH, help="Also write the numbers as JSON.")
def main(
    bundle: Path, images: int, anew: int, reference: bool, strip: Path | None, output: Path | None
) -> None:
    """Measure editing on the demo of texts."""
    from hart_runtime.runtime.pipeline import Pipeline

    if reference:
        require("hart_runtime.compare.editing", "export", "torch", "safetensors")
    pipeline = Pipeline.load(bundle, device="cpu")
    if pipeline.bundle.manifest.checkpoint["source"] != "checkpoint" or pipeline.classes:
        raise InputError(f"{bundle}: is no bundle of the demo of texts, whose pictures are edited here")
    tasks = replacements(images)
    numbers = {f"tokenizer: {name}": value for name, value in reconstructed(pipeline, tasks).items()}
    sources = [source_for(pipeline, task, anew) for task in tasks]
    drawn = edited(pipeline, tasks, sources)
    numbers |= {f"bundle: {name}, %": value for name, value in rates(tasks, drawn).items()}
    equal = [
        np.array_equal(_bytes(image)[~s.drawn], s.pixels[~s.drawn])
        for image, s in zip(drawn, sources, strict=True)
    ]
    numbers["bundle: bytes outside of the box equal, %"] = 100 * float(np.mean(equal))
    if reference:
        numbers |= {f"reference: {k}, %": v for k, v in rates(tasks, by_reference(tasks, sources)).items()}
    for name, value in numbers.items():
        click.echo(f"{name:<48}{value:8.2f}")
    if strip:
        _strip(pipeline, tasks, drawn).save(strip, optimize=True)
    if output:
        output.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def source_for(pipeline: Pipeline, task: Replacement, anew: int) -> Source:
    """The picture with its box, for the pipeline."""
    from hart_runtime.runtime.pictures import source_of

    picture, box = Image.fromarray(_bytes(task.picture)), Image.fromarray(task.box.astype(np.uint8) * 255)
    return source_of(pipeline.bundle.manifest.model, picture, box, anew=anew)


def reconstructed(pipeline: Pipeline, tasks: list[Replacement]) -> dict[str, float]:
    """PSNR in dB of both ways to decode, of the mean squared error of all pictures."""
    squared: dict[str, list[float]] = {}
    for task in tasks:
        for name, value in pipeline.reconstruct(Image.fromarray(_bytes(task.picture))).psnr.items():
            squared.setdefault(name, []).append(10 ** (-value / 10))
    return {f"PSNR {name}, dB": float(-10 * np.log10(np.mean(v))) for name, v in squared.items()}


def edited(pipeline: Pipeline, tasks: list[Replacement], sources: list[Source]) -> list[Array]:
    """What the bundle draws, pasted, with seeds 0, 1, ..."""
    settings = pipeline.bundle.manifest.sampling
    jobs = [(task.new.caption(), seed) for seed, task in enumerate(tasks)]
    found = []
    for start in range(0, len(jobs), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        for result in pipeline.jobs(jobs[part], settings, sources=sources[part]):
            found += [np.asarray(image, np.float32) / np.float32(255) for image in result.images]
    return found


def by_reference(tasks: list[Replacement], sources: list[Source]) -> list[Array]:
    """The same by the reference model, in PyTorch."""
    import torch
    from tokenizers import Tokenizer

    from hart_runtime.common.checkpoint import find_checkpoint
    from hart_runtime.common.noise import SeededNoise
    from hart_runtime.common.text_tokenizer import PromptTokenizer
    from hart_runtime.hart.checkpoint import load_hart, load_text_encoder
    from hart_runtime.hart.demo import DEMO_CHECKPOINT
    from hart_runtime.hart.editing import kept_of
    from hart_runtime.hart.generate import generate
    from hart_runtime.runtime.editing import as_input
    from hart_runtime.runtime.pasting import pasted

    checkpoint = find_checkpoint(DEMO_CHECKPOINT)
    assert checkpoint.text_encoder is not None
    model, text = load_hart(checkpoint), load_text_encoder(checkpoint.text_encoder)
    config = model.transformer.config
    vocabulary = Tokenizer.from_file(str(checkpoint.text_encoder.folder / "tokenizer.json"))
    prompts = PromptTokenizer(vocabulary, config.context_token)
    found: list[Array] = []
    for start in range(0, len(tasks), AT_ONCE):
        part = sources[start : start + AT_ONCE]
        captions = [task.new.caption() for task in tasks[start : start + AT_ONCE]]
        ids, mask = (torch.from_numpy(array) for array in prompts(captions))
        cells = [
            np.concatenate(maps) for maps in zip(*(s.cells(config.patch_nums) for s in part), strict=True)
        ]
        images = torch.from_numpy(np.concatenate([as_input(s.pixels) for s in part]))
        kept = kept_of(model.tokenizer, images, cells, config.patch_nums)
        with torch.inference_mode():
            features = text(ids, mask)
        noise = SeededNoise(range(start, start + len(part)))
        drawn = generate(model, features, mask, noise, checkpoint.sampling, kept=kept)
        found += [*pasted(drawn.numpy(), part).transpose(0, 2, 3, 1)]
    return found


def _strip(pipeline: Pipeline, tasks: list[Replacement], drawn: list[Array]) -> Image.Image:
    """A row for each of a few pictures: given, of its codes alone, with their rest, its box, replaced, varied
    and drawn further.
    """
    rows = []
    for task, image in itertools.islice(zip(tasks, drawn, strict=True), ROWS):
        picture = Image.fromarray(_bytes(task.picture))
        boxed = np.where(task.box[..., None], 1 - 0.3 * (1 - task.picture), task.picture)
        told = task.old.caption()
        tiles = [
            picture,
            *pipeline.reconstruct(picture).images.values(),
            _bytes(boxed),
            _bytes(image),
            *pipeline.vary(picture, 2, told, seed=1),
            *pipeline.edit(picture, None, told, seed=1, outpaint=(16, 16, 16, 16)),
        ]
        rows.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.quantize(COLOURS)  # a file of a third of the size


def _bytes(image: Array) -> NDArray[np.uint8]:
    """(H, W, 3) in [0, 1] as bytes."""
    return (image * 255 + 0.5).astype(np.uint8)


if __name__ == "__main__":
    main()
