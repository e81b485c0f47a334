"""PNG files that know how they were made, and can be made again."""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hart_runtime.common.errors import InputError, RunError, first_line, parameter, shown
from hart_runtime.common.files import check_output, whole_file
from hart_runtime.common.noise import NOISE_VERSION
from hart_runtime.common.records import read_value
from hart_runtime.common.settings import SamplingSettings, whole_settings_of
from hart_runtime.common.version import __version__
from hart_runtime.runtime.backends.names import CPU
from hart_runtime.runtime.picture_record import PictureRecord

if TYPE_CHECKING:
    from hart_runtime.runtime.backends.backend import Backend

KEY = "hart"
SIGNATURE, RGB, SUB = b"\x89PNG\r\n\x1a\n", 2, 1
"""Of PNG: how a file begins, a kind of colour, and the filter that subtracts the pixel before."""
LEVEL = 1
MOST_WAITING = 4
"""Pictures that wait to be written, 3 MB each at 1024 x 1024, before the next has to wait for them."""
FIRST_NOISE = 1
"""Version of the random numbers of pictures that do not tell it."""


@dataclass(frozen=True)
class Origin:
    """Everything that decides a picture."""

    prompt: str
    seed: int
    settings: SamplingSettings
    bundle: str
    """Name of the bundle."""
    identity: str
    """sha256 of the bundle's manifest."""
    noise_version: int = NOISE_VERSION
    """Version of the random numbers that its seed stands for."""
    drawn_with: str = ""
    """Backend, device and version: others round differently. Empty in pictures of before it was told."""
    picture: PictureRecord | None = None
    """Of the picture that was given, if there was one."""
    size: int | None = None
    """Pixels along a side; None in pictures of before it was told, which are of their bundle's own size."""


def save_png(image: Image.Image, path: Path, origin: Origin) -> None:
    """Write a picture that knows how it was made; no half picture is ever there.

    Raises:
        RunError: it cannot be written.
    """
    data = png_bytes(image, origin)
    try:
        with whole_file(path) as file:
            file.write(data)
    except InputError as error:  # what was there before the drawing, and is no more
        raise RunError(str(error)) from None


def png_bytes(image: Image.Image, origin: Origin) -> bytes:
    """The file that :func:`save_png` writes."""
    told = asdict(origin) | {"version": __version__}
    if origin.picture is None:  # older versions know no such thing, and need not
        del told["picture"]
    record = json.dumps(told, ensure_ascii=False)
    return encoded(image, {KEY: record, "Description": origin.prompt})


def means(backend: Backend, tf32: bool = False) -> str:
    """What else decides a picture's last bits, as :attr:`Origin.drawn_with` tells it."""
    rounded = ", tf32" if tf32 and backend.device != CPU else ""
    return f"hart-runtime {__version__}, {backend.name} on {backend.device}{rounded}"


def encoded(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A PNG file, compressed at the level that takes a fourth of the time of the usual one.

    Pillow's writer keeps other threads of Python from running while it compresses; this does not.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    rows = np.full((height, 1 + 3 * width), SUB, np.uint8)  # each begins with the number of its filter
    rows[:, 1:4] = pixels[:, 0]
    np.subtract(pixels[:, 1:], pixels[:, :-1], out=rows[:, 4:].reshape(height, width - 1, 3))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)),
        *((b"iTXt", key.encode("latin-1") + bytes(5) + text.encode()) for key, text in texts.items()),
        (b"IDAT", zlib.compress(rows.data, LEVEL)),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in chunks
    )


class PngWriter:
    """Writes pictures in a thread while the next ones are drawn, in the order they come.

    Leaving it waits until all files are whole.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="png")
        self._coming: deque[tuple[Future[None], Path]] = deque()
        self.written: list[Path] = []

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait_for(0)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def save(self, image: Image.Image, path: Path, origin: Origin) -> None:
        """As :func:`save_png`; waits only if :data:`MOST_WAITING` pictures are not written yet.

        Raises:
            RunError: this picture or one before it could not be written.
        """
        self._wait_for(MOST_WAITING - 1)
        self._coming.append((self._thread.submit(save_png, image, path, origin), path))

    def _wait_for(self, left: int) -> None:
        while self._coming and (len(self._coming) > left or self._coming[0][0].done()):
            job, path = self._coming.popleft()
            job.result()
            self.written.append(path)


def check_writable(path: Path) -> None:
    """Refuse an output that cannot be written, before the work is done."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{parameter('path', path)}: expected a file ending in .png")
    check_output(path, parameter("path", path))


def read_origin(path: Path) -> Origin:
    """The :class:`Origin` that :func:`save_png` stored in a picture.

    Raises:
        InputError: the picture carries none, a damaged one, or one of other random numbers.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(KEY)
    except Exception as error:  # damaged files raise anything, decompression bombs included
        raise InputError(f"{path}: not a readable picture ({first_line(error)})") from None
    if text is None:
        raise InputError(f"{path}: carries no prompt and seed; it was not drawn by hart-run")
    try:
        record = json.loads(text)
        prompt, seed, settings = record["prompt"], record["seed"], record["settings"]
        noise = record.get("noise_version", FIRST_NOISE)
        if type(prompt) is not str or type(seed) is not int or type(noise) is not int:
            raise TypeError(f"prompt {shown(prompt)}, seed {shown(seed)}, noise_version {shown(noise)}")
        drawn_with, bundle, identity = record.get("drawn_with", ""), record["bundle"], record["identity"]
        if not all(isinstance(value, str) for value in (drawn_with, bundle, identity)):
            raise TypeError(f"bundle {shown(bundle)}, {shown(identity)}, drawn_with {shown(drawn_with)}")
        picture = read_value(PictureRecord | None, record.get("picture"), "picture")
        size = read_value(int | None, record.get("size"), "size")
        origin = Origin(
            prompt=prompt,
            seed=seed,
            settings=whole_settings_of(settings, "settings"),
            bundle=bundle,
            identity=identity,
            noise_version=noise,
            drawn_with=drawn_with,
            picture=picture,
            size=size,
        )
    except KeyError as error:
        raise InputError(f"{path}: its prompt and seed are damaged (no {error.args[0]})") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its prompt and seed are damaged ({first_line(error)})") from None
    if noise != NOISE_VERSION:
        raise InputError(
            f"{path}: its seed stands for random numbers of version {noise}, here they are of version "
            f"{NOISE_VERSION}: it can be drawn again with the hart-runtime that drew it "
            f"({shown(record.get('version'))}), or give prompt and seed for another picture"
        )
    return origin
