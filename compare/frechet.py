"""Frechet Inception Distance (arXiv 1706.08500) of drawn pictures.

``python -m hart_runtime.compare.frechet FOLDER --reference FILE --weights FILE``. Nothing is downloaded:
weights and statistics are files of the user's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import InputError, first_line, guarded, shown
from hart_runtime.common.install import require
from hart_runtime.hart.frechet import Normal, distance

log = logging.getLogger(__name__)

FEATURES = 2048
"""Of Inception's last pooling."""
BATCH = 32
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STATISTICS = ".npz"
PUBLISHED = 50_000
"""Pictures that published distances are of."""

Pixels = NDArray[np.uint8]
Extract = Callable[[Pixels], NDArray[np.float32]]
"""Pictures (B, H, W, 3) to their features (B, D)."""


def normal_of(source: Path, extract: Extract, progress: Callable[[int, int], None]) -> Normal:
    """That of the features of a folder's pictures, or the one that a file of statistics holds.

    Args:
        source: a folder, with those below it, or an ``.npz`` with ``mu`` and ``sigma``.
        progress: told how many pictures are done, and how many there are.

    Raises:
        InputError: there is neither, a picture cannot be read or has another size than the others, or
            the file cannot be used.
    """
    if not source.is_dir():
        return _read_statistics(source)
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise InputError(f"{source}: expected pictures ({', '.join(PICTURES)}), found {len(files)}")
    if len(files) < PUBLISHED:
        log.warning(
            "%s: %d pictures; published distances are of %d, and of fewer they come out larger",
            source,
            len(files),
            PUBLISHED,
        )
    parts = []
    for start, pixels in enumerate(_batches(files)):
        parts.append(extract(pixels))
        progress(min((start + 1) * BATCH, len(files)), len(files))
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise InputError(f"{source}: features of its pictures hold NaN or infinity; give other `weights`")
    return Normal.of(features)


def _batches(files: Sequence[Path]) -> Iterator[Pixels]:
    first = _pixels(files[0])
    for start in range(0, len(files), BATCH):
        batch = [_pixels(file) for file in files[start : start + BATCH]]
        for file, pixels in zip(files[start:], batch, strict=False):
            if pixels.shape != first.shape:
                sizes = [f"{a.shape[1]} x {a.shape[0]}" for a in (first, pixels)]
                raise InputError(
                    f"{file}: expected {sizes[0]} px as {files[0].name}, found {sizes[1]}; a distance is of "
                    f"pictures of one size"
                )
        yield np.stack(batch)


def _pixels(file: Path) -> Pixels:
    """(H, W, 3)"""

    def load() -> Pixels:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))

    return guarded(load, f"{file}: not a readable picture")


def _read_statistics(file: Path) -> Normal:
    if not file.is_file():
        raise InputError(f"{file}: no such folder of pictures, nor a file of statistics")
    if file.suffix != STATISTICS:
        raise InputError(f"{file}: expected a folder of pictures, or statistics in {STATISTICS}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # whatever zip files, numpy and text that is none raise
        raise InputError(
            f"{file}: expected arrays mu and sigma, as the ADM evaluation suite's files have them "
            f"({first_line(error)})"
        ) from None
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        found = f"{shown(mean.shape)} and {shown(covariance.shape)}"
        raise InputError(f"{file}: expected mu and sigma of {FEATURES} features, found {found}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{file}: mu and sigma hold NaN or infinity")
    return Normal(mean, covariance)


@command()
@click.argument("folders", nargs=-1, required=True, type=PATH, metavar="FOLDER...")
@click.option("--reference", required=True, type=PATH, metavar="FILE|FOLDER", help="Statistics, or pictures.")
@click.option("--weights", required=True, type=PATH, metavar="FILE", help="Inception's, as a state dict.")
def main(folders: tuple[Path, ...], reference: Path, weights: Path) -> None:
    """Print the Frechet distance of the pictures in each FOLDER to a reference.

    The reference is an .npz file with mu and sigma (the ADM evaluation suite's
    VIRTUAL_imagenet256_labeled.npz), or a folder of pictures. Nothing is downloaded.
    """
    require("the Frechet distance", "fid", "torch", "torch_fidelity")
    from rich.console import Console
    from rich.progress import Progress

    from hart_runtime.compare.inception import inception

    extract = inception(weights)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:

        def normal(source: Path) -> Normal:
            task = bars.add_task(str(source), total=None)
            return normal_of(source, extract, lambda d, n: bars.update(task, completed=d, total=n))

        ruler = normal(reference)
        found = {folder: distance(normal(folder), ruler) for folder in folders}
    for folder, value in found.items():
        click.echo(f"{folder}: {value:.4f}")


if __name__ == "__main__":
    main()
