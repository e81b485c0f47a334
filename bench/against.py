"""The PyTorch reference beside the bundle: same weights, same seeds, same device, turn by turn."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from bench.result import Samples
from bench.workload import draw_features, text_features
from hart.errors import InputError
from hart.noise import SeededNoise
from runtime.bundle import Bundle, sha256_of
from runtime.pipeline import Pipeline, to_images

if TYPE_CHECKING:
    from hart.model import Hart

EAGER, COMPILED = "torch-eager", "torch-compile"
REFERENCES = (EAGER, COMPILED)
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
    checkpoint: Path,
    iterations: int,
    warmup: int,
    threads: int | None,
    progress: Callable[[str], None],
) -> list[Comparison]:
    """Draw one picture with the bundle and with each reference, ``iterations`` times in turns.

    Args:
        checkpoint: as :func:`find_checkpoint` returned it.
        warmup: rounds that are not counted, the first pictures among them.
    """
    import torch

    from hart.checkpoint import load_hart

    if threads:
        torch.set_num_threads(threads)
    device = torch.device(pipeline.backend.device)
    # Float32 weights on every device; half precision is the autocast's business.
    model = load_hart(checkpoint, ema=_averaged(pipeline.bundle))
    model = type(model)(model.transformer.to(device), model.tokenizer.to(device))
    features, mask = text_features(pipeline, 1)
    settings = pipeline.bundle.manifest.sampling
    patch_nums = pipeline.bundle.manifest.model.patch_nums
    on_device = torch.from_numpy(features).to(device), torch.from_numpy(mask).to(device)

    def reference(model: Hart) -> Draw:
        from hart.generate import generate

        def draw() -> list[Image.Image]:
            with _precision(device):
                pixels = generate(model, *on_device, SeededNoise([0]), settings, patch_nums)
            return to_images(pixels.float().cpu().numpy())

        return draw

    draws: dict[str, Draw] = {"bundle": lambda: draw_features(pipeline, features, mask)}
    for name in references:
        draws[name] = reference(model if name == EAGER else _compiled(model))
    first: dict[str, float] = {}
    pictures = {}
    for name, draw in draws.items():
        progress(f"{name}, first picture")
        first[name], pictures[name] = _timed(draw)
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for round_ in range(-max(0, warmup - 1), iterations):
        for name, draw in draws.items():
            progress(f"{name} in turns")
            taken, _ = _timed(draw)
            if round_ >= 0:
                seconds[name].append(taken)
    ours = seconds["bundle"]
    return [
        Comparison(
            name,
            Samples.of(seconds[name]),
            Samples.of(ours),
            Samples.of([theirs / mine for theirs, mine in zip(seconds[name], ours, strict=True)]),
            first[name],
            _psnr(pictures["bundle"][0], pictures[name][0]),
        )
        for name in references
    ]


def find_checkpoint(bundle: Bundle, given: Path | None) -> Path:
    """The checkpoint that a bundle was exported from: the one given, or the demo's.

    Raises:
        InputError: torch is not there, or the weight files are not those that were exported.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            "--against needs torch; install it with: pip install 'hart-runtime[export]'"
        ) from None
    from hart.demo import DEMO_CHECKPOINT

    checkpoint = given or DEMO_CHECKPOINT
    if _weights(bundle, checkpoint) == {part: _exported(bundle)[part] for part in ("llm", "tokenizer")}:
        return checkpoint
    source = bundle.manifest.checkpoint["source"]
    if given is None:
        raise InputError(f"--against needs the checkpoint of {bundle.folder} ({source}); give --checkpoint")
    raise InputError(
        f"--checkpoint {given}: its weights are not those that {bundle.folder} was exported from ({source})"
    )


def _weights(bundle: Bundle, checkpoint: Path) -> dict[str, dict[str, str]]:
    """sha256 of the weight files that an export of this checkpoint would read."""
    from hart.checkpoint import find_folders, llm_weight_files, weight_files

    llm, tokenizer = find_folders(checkpoint)
    files = {"llm": llm_weight_files(llm, _averaged(bundle)), "tokenizer": weight_files(tokenizer)}
    return {part: {file.name: sha256_of(file) for file in found} for part, found in files.items()}


def _exported(bundle: Bundle) -> dict[str, dict[str, str]]:
    weights: dict[str, dict[str, str]] = bundle.manifest.checkpoint["weights"]
    return weights


def _averaged(bundle: Bundle) -> bool:
    """Whether the bundle holds the averaged weights."""
    return "ema_model.bin" in _exported(bundle)["llm"]


def _compiled(model: Hart) -> Hart:
    """The same weights in modules that torch.compile has taken over."""
    shared: dict[int, Any] = {id(p): p for part in model for p in part.parameters()}
    copied = copy.deepcopy(model, shared)
    copied.transformer.compile(dynamic=True)
    copied.transformer.diffloss.net.compile(dynamic=True)
    copied.tokenizer.decoder.compile()
    return copied


@contextlib.contextmanager
def _precision(device: Any) -> Iterator[None]:
    """Half-precision autocast on CUDA, as the published sampler runs; float32 on the CPU."""
    import torch

    with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
        yield


def _timed(draw: Draw) -> tuple[float, list[Image.Image]]:
    """Seconds until the pixels are on the host, which waits for every graph and kernel."""
    start = time.perf_counter()
    images = draw()
    return time.perf_counter() - start, images


def _psnr(one: Image.Image, other: Image.Image) -> float | None:
    a, b = (np.asarray(image, np.float64) for image in (one, other))
    error = float(np.square(a - b).mean())
    return 10 * math.log10(255**2 / error) if error else None
