"""What a PNG tells of the picture that it was drawn from: with that one beside it, it can be drawn again."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError
from hart_runtime.common.records import FREE
from hart_runtime.runtime.pictures import COVER, NO_MARGINS, Given, Margins, Source, plain_source
from hart_runtime.runtime.spec import ModelSpec


@dataclass(frozen=True)
class PictureRecord:
    """Of a :class:`hart_runtime.runtime.pictures.Source`."""

    sha256: str
    """Of its pixels, fitted to the model."""
    mask: str = field(metadata=FREE)
    """Where it was drawn anew: bits row by row, compressed, in base64."""
    vary: int | None = None
    anew: int = 0
    paste: bool = True
    fit: str = COVER
    outpaint: Margins = NO_MARGINS


def record_of(source: Source) -> PictureRecord:
    """What :func:`source_again` needs beside the picture."""
    bits = zlib.compress(np.packbits(source.drawn).tobytes(), 9)
    return PictureRecord(
        sha256=source.sha256,
        mask=base64.b64encode(bits).decode(),
        vary=source.vary,
        anew=source.anew,
        paste=source.paste,
        fit=source.fit,
        outpaint=source.outpaint,
    )


def source_again(record: PictureRecord, model: ModelSpec, image: Given) -> Source:
    """The same picture with the same mask.

    Raises:
        InputError: another picture, a damaged record, or as
            :func:`hart_runtime.runtime.pictures.plain_source`.
    """
    source = plain_source(model, image, record.fit, record.outpaint)
    if source.sha256 != record.sha256:
        raise InputError(
            f"`image`: is another picture than the one it was drawn from: its pixels have sha256 "
            f"{source.sha256[:12]}..., expected {record.sha256[:12]}..."
        )
    return replace(source, drawn=_mask(record, model), vary=record.vary, anew=record.anew, paste=record.paste)


def _mask(record: PictureRecord, model: ModelSpec) -> NDArray[np.bool_]:
    side = model.image_size
    size = -(-side * side // 8)
    try:
        bits = zlib.decompressobj().decompress(base64.b64decode(record.mask, validate=True), size + 1)
    except (ValueError, zlib.error):
        bits = b""
    fine = len(bits) == size and 0 <= record.anew <= model.num_scales
    if not fine or (record.vary is not None and not 0 < record.vary < model.num_scales):
        raise InputError("what the picture tells of its mask is damaged")
    return (
        np.unpackbits(np.frombuffer(bits, np.uint8), count=side * side).reshape(side, side).astype(np.bool_)
    )
