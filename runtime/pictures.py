"""Pictures that users give: read, turned upright, fitted to the model, with a mask of what is drawn anew.

Files come from strangers. Pillow is told to open six formats and no other: some of its readers start outside
programs. A picture is read as a whole, and whatever is wrong with it is one sentence.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hart_runtime.common.editing import Cells, kept_first, kept_inside
from hart_runtime.common.errors import (
    InputError,
    first_line,
    one_of,
    parameter,
    shown,
    true_or_false,
    whole_in_range,
)
from hart_runtime.common.files import read_regular
from hart_runtime.runtime.spec import ModelSpec

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 1 << 26
"""Of a given picture, as large as 8192 x 8192."""
COVER, CONTAIN, STRETCH = FITS = ("cover", "contain", "stretch")
"""How a picture of another shape becomes a square: its sides are cut off, or get bars, or it is bent."""
HALF = 128
"""A mask is white, and a picture opaque, from this value on."""
WIDE = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
"""Pillow's modes of 16 bits a pixel."""
NO_MARGINS = (0, 0, 0, 0)

Given = str | Path | bytes | Image.Image
"""A file, what is in one, or a picture of Pillow's."""
Pixels = NDArray[np.uint8]
Margins = tuple[int, int, int, int]
"""Pixels to the left of a picture, above it, to its right and below it."""

# There is a limit of our own, below the one that Pillow warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, eq=False)
class Source:
    """A given picture as a drawing takes it, made by :func:`source_of`. It is not to be written to."""

    pixels: Pixels
    """(S, S, 3), fitted to the model's size."""
    drawn: NDArray[np.bool_]
    """(S, S), True where the picture is drawn anew."""
    vary: int | None = None
    """How many of the first scales are kept whole, and of the others nothing; None to go by ``drawn``."""
    anew: int = 0
    """How many of the coarsest scales are drawn whole, whatever the mask; the published rule is 0."""
    paste: bool = True
    """Whether the given pixels stand in the result wherever it was not to be drawn."""
    fit: str = COVER
    outpaint: Margins = NO_MARGINS

    @property
    def sha256(self) -> str:
        """Of its pixels, whatever file they came in."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def cells(self, patch_nums: Sequence[int]) -> tuple[Cells, ...]:
        """What is kept at each scale, (1, n, n); a cell in which one pixel is drawn is drawn."""
        if self.vary is not None:
            return kept_first(self.vary, patch_nums)
        side = patch_nums[-1]
        size = len(self.drawn) // side
        touched = self.drawn.reshape(1, side, size, side, size).max((2, 4))
        return kept_inside(~touched, patch_nums, self.anew)


def source_of(
    model: ModelSpec,
    image: Given,
    mask: Given | None = None,
    *,
    outpaint: Sequence[int] = NO_MARGINS,
    vary: int | None = None,
    anew: int = 0,
    fit: str | None = None,
    paste: bool = True,
) -> Source:
    """Make what a drawing takes of a picture and what is said of it.

    What is drawn anew: where the mask is white (of one with transparency, where it is transparent), without
    a mask where the picture is transparent; margins of ``outpaint``, and bars of ``fit="contain"`` where
    anything is drawn by place. ``vary`` draws everywhere, but by scales.

    Args:
        mask: of the picture's size.
        outpaint: pixels of the picture's own size to be added to the left, above, to the right and below.
        vary: scales that are kept, from 1 to all but the last.
        anew: as :attr:`Source.anew`.
        fit: one of :data:`FITS`; by default what ``outpaint`` adds is not cut off again, and else the picture
            fills the square.
        paste: as :attr:`Source.paste`; there is nothing to paste with ``vary``.

    Raises:
        InputError: a file cannot be read, is no picture or an animated one, a mask of another size, or
            nothing is said of what to draw.
    """
    true_or_false("paste", paste)
    margins = _margins(outpaint)
    fit = _fit(fit, margins)
    whole_in_range("anew", anew, 0, model.num_scales)
    picture, opaque = _flattened(read_picture(image, "image"))
    if vary is not None:
        vary = whole_in_range("vary", vary, 1, model.num_scales - 1, " (scales that are kept)")
        if mask is not None or any(margins) or anew:
            raise InputError("`vary`: draws everywhere, found `mask`, `outpaint` or `anew` beside it")
    drawn = ~opaque if mask is None else _drawn_by(read_picture(mask, "mask"), picture.size)
    asked = vary is not None or mask is not None or any(margins) or bool(drawn.any())
    if not asked:
        raise InputError(
            "`image`: nothing is said of what to draw: give `mask`, `outpaint` or `vary`, or a picture that "
            "is transparent there"
        )
    pixels, drawn = _fitted(*_widened(np.asarray(picture), drawn, margins), model.image_size, fit)
    if vary is not None:
        drawn = np.ones_like(drawn)
    elif not drawn.any():
        raise InputError(
            f"`mask`: is black, or opaque, wherever {parameter('fit', fit)} leaves it, nothing is to be drawn"
        )
    return Source(pixels, drawn, vary, anew, paste and vary is None, fit, margins)


def plain_source(
    model: ModelSpec, image: Given, fit: str | None = None, outpaint: Sequence[int] = NO_MARGINS
) -> Source:
    """A picture of which nothing is drawn; raises InputError as :func:`source_of`."""
    margins = _margins(outpaint)
    fit = _fit(fit, margins)
    picture, opaque = _flattened(read_picture(image, "image"))
    pixels, drawn = _fitted(*_widened(np.asarray(picture), ~opaque, margins), model.image_size, fit)
    return Source(pixels, np.zeros_like(drawn), fit=fit, outpaint=margins)


def read_picture(given: Given, name: str, most: int = MOST_PIXELS) -> Image.Image:
    """A picture, upright; RGBA where it has transparency, L where it has no colours, else RGB.

    Args:
        name: of the parameter, for messages.
        most: pixels; no picture of more is unpacked.

    Raises:
        InputError: as :func:`source_of`.
    """
    if isinstance(given, Image.Image):
        _refuse_large(f"`{name}`", given.size, most)
        return _converted(given, f"`{name}`")
    if isinstance(given, str | Path):
        said = parameter(name, given)
        try:
            data = read_regular(Path(given))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"{said}: cannot be read ({why})") from None
    elif isinstance(given, bytes):
        said, data = f"`{name}`", given
    else:
        raise InputError(f"`{name}`: expected a file or a picture, found {shown(type(given).__name__)}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_large(said, image.size, most)
            if image.format in ("PNG", "WEBP", "GIF", "TIFF") and getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{said}: holds several pictures, or moves; give a single one")
            image.load()
            return _converted(image, said)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{said}: is no picture in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{said}: not a readable picture ({first_line(error)})") from None


def _converted(image: Image.Image, said: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in WIDE:
            return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8))
        if image.mode in ("L", "1"):
            return image.convert("L") if "transparency" not in image.info else image.convert("RGBA")
        clear = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        if image.mode == "F":
            raise ValueError("its pixels are floating point numbers")
        return image.convert("RGBA" if clear else "RGB")
    except Exception as error:  # as above
        raise InputError(f"{said}: not a readable picture ({first_line(error)})") from None


def _refuse_large(said: str, size: tuple[int, int], most: int = MOST_PIXELS) -> None:
    width, height = size
    if not 0 < width * height <= most:
        raise InputError(f"{said}: expected 1 to {most} pixels, found {width} x {height}")


def _fit(fit: str | None, margins: Margins) -> str:
    if fit is None:
        return CONTAIN if any(margins) else COVER
    one_of("fit", fit, FITS)
    return fit


def margins_of(words: str) -> tuple[int, ...]:
    """The pixels of ``outpaint`` as a command line or a form has them: LEFT,TOP,RIGHT,BOTTOM.

    Raises:
        InputError: they are not four whole numbers.
    """
    try:
        found = tuple(int(part) for part in words.split(","))
    except ValueError:
        found = ()
    if len(found) != len(NO_MARGINS):
        given = parameter("outpaint", words)
        raise InputError(f"{given}: expected pixels to the left, above, to the right and below: 0,0,64,0")
    return found


def _margins(outpaint: Any) -> Margins:
    try:
        left, above, right, below = (whole_in_range("outpaint", n, 0, MOST_PIXELS) for n in outpaint)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"`outpaint`: expected four numbers of pixels, to the left, above, to the right and below, found "
            f"{shown(outpaint)}"
        ) from None
    return left, above, right, below


def _flattened(image: Image.Image) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A picture in RGB, and where it is opaque. What is not gets the mean colour of the rest: coarse codes,
    which are kept, are of the whole picture, and what hides under transparent pixels is not to be seen in it.
    """
    if image.mode != "RGBA":
        return image.convert("RGB"), np.ones((image.height, image.width), np.bool_)
    values = np.asarray(image).astype(np.float32)
    alpha = values[..., 3:] / 255
    mean = (values[..., :3] * alpha).sum((0, 1)) / max(float(alpha.sum()), 1.0)
    mixed = values[..., :3] * alpha + mean * (1 - alpha)
    return Image.fromarray(mixed.round().astype(np.uint8)), values[..., 3] >= HALF


def _drawn_by(mask: Image.Image, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a mask says to draw."""
    if mask.size != size:
        wanted, found = (f"{width} x {height}" for width, height in (size, mask.size))
        raise InputError(f"`mask`: expected the picture's size, {wanted}, found {found}")
    if mask.mode == "RGBA":
        return np.asarray(mask.getchannel("A")) < HALF
    return np.asarray(mask.convert("L")) >= HALF


def _widened(pixels: Pixels, drawn: NDArray[np.bool_], margins: Margins) -> tuple[Pixels, NDArray[np.bool_]]:
    """Both with margins, which repeat the picture's edge, and are drawn."""
    left, above, right, below = margins
    around = ((above, below), (left, right))
    _refuse_large("`outpaint`", (pixels.shape[1] + left + right, pixels.shape[0] + above + below))
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), np.pad(drawn, around, constant_values=True)


def _fitted(
    pixels: Pixels, drawn: NDArray[np.bool_], side: int, fit: str
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Both as squares of the model's size; bars repeat the picture's edge, and are drawn."""
    picture, mask = Image.fromarray(pixels), Image.fromarray(drawn.astype(np.uint8) * 255)
    size, sharp = (side, side), Image.Resampling.LANCZOS
    if fit == COVER:
        picture = ImageOps.fit(picture, size, sharp)
        mask = ImageOps.fit(mask, size, Image.Resampling.BILINEAR)
    elif fit == STRETCH:
        picture, mask = picture.resize(size, sharp), mask.resize(size, Image.Resampling.BILINEAR)
    else:
        picture = ImageOps.contain(picture, size, sharp)
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    found, white = np.array(picture), np.asarray(mask) >= HALF
    height, width = white.shape
    top, left = (side - height) // 2, (side - width) // 2
    around = ((top, side - height - top), (left, side - width - left))
    found = np.pad(found, (*around, (0, 0)), mode="edge")
    return found, np.pad(white, around, constant_values=True)
