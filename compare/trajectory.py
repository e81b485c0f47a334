"""The whole loop, twice: with the reference's tokens, and on its own.

Both run :func:`hart_runtime.runtime.loop.draw`, the deployed loop, on the reference's random numbers.

Teacher-forced: at every scale the transformer is fed the reference's input tokens and angles
and its own KV cache; its own hidden states go through its own sampling; then the drawn index
is compared and the codes are replaced by the reference's. f_hat, the residual and the picture
are accumulated from the engine's own graphs (in smooth mode, from its own mixtures).

Free-running: text features, where there is a text encoder, tokens and everything after them are the
engine's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from hart_runtime.common.errors import RunError
from hart_runtime.common.noise import RecordedNoise
from hart_runtime.common.precisions import FP8, FP16, FP32, INT8
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.metrics import Array, Picture, cosine, lpips, psnr, ssim
from hart_runtime.compare.recorded import Tensors, batch_of, given_of, places, recorded, recording
from hart_runtime.compare.reference import Reference
from hart_runtime.runtime.backends.backend import Backend, Outputs, Unplanned, Value, Values, Watched
from hart_runtime.runtime.families.names import FAST, INDEX, MASKED_TRANSFORMER, SAMPLE, TRANSFORMER
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.program import Run
from hart_runtime.runtime.text import ENCODE

INDEX_AGREEMENT = {FP32: 1.0, FP16: 0.99, INT8: 0.85, FP8: 0.8}
"""Least share of equal indices under teacher forcing, by precision of the bundle."""
FORCED = {TRANSFORMER: ("x", "angles"), FAST: ("x", "angles"), MASKED_TRANSFORMER: ("tokens",)}
"""What graphs are fed of the reference's under teacher forcing."""
LATENTS = ("f_hat", "f_hat_out", "tokens_out")
"""Outputs that a picture is made of, step by step."""
PSNR = {FP32: 40.0, FP16: 40.0, INT8: 30.0, FP8: 30.0}
"""Least PSNR in dB of teacher-forced pictures, by precision of the bundle."""
PIXEL = 1 / 255
"""Largest difference of a pixel of free-running pictures, for float32 bundles."""


@dataclass(frozen=True)
class Pictures:
    """One batch's pictures and how close they are; the worst of the batch."""

    psnr: float
    ssim: float | None
    lpips: float | None
    max_pixel_error: float
    images: Picture = field(repr=False)
    """(B, 3, H, W)"""


@dataclass(frozen=True)
class Trajectory:
    """One batch through the loop."""

    passed: bool
    failure: str | None
    """Why there is no picture."""
    agreement: list[float]
    """Share of equal indices per scale; none where tokens are continuous."""
    total_agreement: float | None
    latent_cosine: list[float | None]
    """Of f_hat per scale, or of the tokens per iteration; the last is the final latent."""
    first_difference: dict[str, int] | None
    """Scale, picture and token of the first index that differs."""
    pictures: Pictures | None


def teacher_forced(
    backend: Backend, manifest: Manifest, precision: str, reference: Reference, tensors: Tensors
) -> Trajectory:
    """See the module's docstring. Passes on index agreement and PSNR."""
    forced = _forced(backend, manifest, reference.settings, tensors)
    run = _run(forced, manifest, reference, tensors, given_of(tensors, manifest))
    enough = run.total_agreement is None or run.total_agreement >= INDEX_AGREEMENT[precision]
    close = run.pictures is not None and run.pictures.psnr >= PSNR[precision]
    return replace(run, passed=enough and close)


def free_running(
    backend: Backend, manifest: Manifest, precision: str, reference: Reference, tensors: Tensors
) -> Trajectory:
    """See the module's docstring. Float32 bundles pass on the largest difference of a pixel."""
    given: dict[str, Value] = {**given_of(tensors, manifest)}
    if "input_ids" in tensors:
        given |= backend.run(ENCODE, {"input_ids": tensors["input_ids"], "mask": given["mask"]})
    run = _run(backend, manifest, reference, tensors, given)
    same = precision != FP32 or (run.pictures is not None and run.pictures.max_pixel_error <= PIXEL)
    return replace(run, passed=run.pictures is not None and same)


def _forced(backend: Backend, manifest: Manifest, settings: SamplingSettings, tensors: Tensors) -> Backend:
    """A backend that swaps in the reference's tokens, scale after scale.

    Without a plan, which would have the engine read its own tokens where these are swapped in.
    """
    dims = manifest.scale_dims(batch_of(tensors), settings)

    def theirs(run: Run, names: tuple[str, ...], outputs: bool) -> Values:
        found = places(manifest, run, outputs)
        found = {name: where for name, where in found.items() if name in names and where[1] in tensors}
        return {name: recorded(tensors, *where, dims[run.index]) for name, where in found.items()}

    def around(run: Run, inputs: Values, proceed: Callable[[Values], Outputs]) -> Outputs:
        if run.graph in FORCED:
            return proceed({**inputs, **theirs(run, FORCED[run.graph], outputs=False)})
        outputs = proceed(inputs)
        return {**outputs, **theirs(run, ("codes",), outputs=True)} if run.graph == SAMPLE else outputs

    return Watched(Unplanned(backend), around)


def _run(
    backend: Backend,
    manifest: Manifest,
    reference: Reference,
    tensors: Tensors,
    given: Values,
) -> Trajectory:
    """Draw one batch and compare it; whether that is close enough is for the caller to say."""
    recorder, found = recording(backend, manifest)
    failure, images = None, None
    program = manifest.program(reference.settings, batch_of(tensors))
    try:
        images = drawn(draw(recorder, program, given, RecordedNoise(tensors))).images
    except RunError as error:
        failure = str(error)
    made = [places(manifest, run) for run in program.runs()]
    indices = [outputs[INDEX][1] for outputs in made if INDEX in outputs]
    latents = [place for outputs in made for name, (_, place) in outputs.items() if name in LATENTS]
    names = [name for name in indices if name in found]
    equal = [found[name].reshape(tensors[name].shape) == tensors[name] for name in names]
    total = float(np.mean(np.concatenate([e.ravel() for e in equal]))) if equal else 0.0
    return Trajectory(
        passed=False,
        failure=failure,
        agreement=[float(e.mean()) for e in equal],
        total_agreement=total if indices else None,
        latent_cosine=[cosine(tensors[name], found[name]) if name in found else None for name in latents],
        first_difference=_first_difference(equal),
        pictures=_compare_pictures(tensors["image"], images) if images is not None else None,
    )


def _first_difference(equal: list[Array]) -> dict[str, int] | None:
    for scale, same in enumerate(equal):
        if not same.all():
            token = int(np.argmax(~same.all(axis=0)))
            return {"scale": scale, "picture": int(np.argmax(~same[:, token])), "token": token}
    return None


def _compare_pictures(reference: Picture, found: Picture) -> Pictures:
    pairs = list(zip(reference, found, strict=True))
    similarities = [value for a, b in pairs if (value := ssim(a, b)) is not None]
    distances = [value for a, b in pairs if (value := lpips(a, b)) is not None]
    return Pictures(
        psnr=min(psnr(a, b) for a, b in pairs),
        ssim=min(similarities) if similarities else None,
        lpips=max(distances) if distances else None,
        max_pixel_error=float(np.abs(reference.astype(np.float64) - found).max()),
        images=found,
    )
