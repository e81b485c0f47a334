"""What the image tokenizer keeps of a picture, with its codes alone and with their continuous rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.editing import as_input, encode
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.pictures import Source

DISCRETE, CONTINUOUS = "discrete", "continuous"
FINEST = 1e-10
"""Mean squared error that a PSNR is given for at the most: 100 dB."""


@dataclass(frozen=True)
class Reconstruction:
    """A picture, encoded and decoded again."""

    given: Image.Image
    """As it was fitted to the model's size."""
    images: dict[str, Image.Image]
    """By name: of the codes alone ("discrete"), and with their rest ("continuous") where a model has one."""
    psnr: dict[str, float]
    """Of each, in dB."""


def reconstruct(backend: Backend, manifest: Manifest, source: Source) -> Reconstruction:
    """Encode and decode a picture; nothing is drawn."""
    encoded = encode(backend, manifest.model.patch_nums, as_input(source.pixels))
    latents = {DISCRETE: encoded.discrete}
    if manifest.model.diff_width:
        latents[CONTINUOUS] = encoded.latent
    program = manifest.program(manifest.sampling, 1)
    given = source.pixels.astype(np.float32) / 255
    images, psnr = {}, {}
    for name, latent in latents.items():
        outputs = backend.run(program.decode, {program.latent: latent})
        pixels = backend.to_host(outputs[program.image])[0].transpose(1, 2, 0)
        images[name] = Image.fromarray((pixels * 255).astype(np.uint8))
        psnr[name] = -10 * math.log10(max(float(np.square(pixels - given).mean()), FINEST))
    return Reconstruction(Image.fromarray(source.pixels), images, psnr)
