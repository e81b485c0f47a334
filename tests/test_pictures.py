"""Pictures that users give: formats, orientation, sizes, masks, and what is refused in a sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hart_runtime.common.errors import InputError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.pasting import pasted, weights
from hart_runtime.runtime.picture_record import PictureRecord, record_of, source_again
from hart_runtime.runtime.pictures import FORMATS, MOST_PIXELS, Source, plain_source, read_picture, source_of
from hart_runtime.runtime.png import Origin, png_bytes, read_origin
from hart_runtime.runtime.spec import ModelSpec

MODEL = ModelSpec((1, 2, 3, 5, 8), 6, 192, 4, 512, 32, 64)
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))


def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        source_of(MODEL, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str, tmp_path: Path) -> None:
    data = stored(NOISE, kind)
    source = source_of(MODEL, data, vary=1)
    assert source.pixels.shape == (64, 64, 3)
    if kind not in ("JPEG", "WEBP", "GIF"):
        assert np.array_equal(source.pixels, np.asarray(NOISE))
    (tmp_path / "of-any-name").write_bytes(data)
    assert source_of(MODEL, tmp_path / "of-any-name", vary=1).sha256 == source.sha256
    assert "not a readable picture" in refused(data[: len(data) // 2], vary=1)


@pytest.mark.parametrize("kind", ["PPM", "EPS", "ICO", "PDF"])
def test_other_formats_are_not_opened(kind: str) -> None:
    assert "is no picture in one of the formats PNG, JPEG" in refused(stored(NOISE, kind), vary=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_several_pictures_in_one(kind: str) -> None:
    more = [Image.new("L", (8, 8), value) for value in (50, 100)]
    data = stored(Image.new("L", (8, 8)), kind, save_all=True, append_images=more)
    assert refused(data, vary=1) == "`image`: holds several pictures, or moves; give a single one"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_modes(mode: str) -> None:
    image = NOISE.convert("I").convert(mode) if mode == "I;16" else NOISE.convert(mode)
    assert source_of(MODEL, image, vary=1).pixels.dtype == np.uint8


def test_sixteen_bits_are_halved() -> None:
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
    found = source_of(MODEL, stored(deep, "PNG"), vary=1).pixels[..., 0]
    assert np.array_equal(found, np.asarray(deep) >> 8)


def test_cameras_that_were_held_sideways() -> None:
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    upright = read_picture(stored(wide, "PNG", exif=exif), "image")
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 8)) == (0, 0, 255)
    assert upright.getpixel((16, 56)) == (255, 0, 0)


def test_large_ones_and_files_that_are_none(tmp_path: Path) -> None:
    side = int(MOST_PIXELS**0.5) + 1
    bomb = stored(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 1 << 20
    assert f"expected 1 to {MOST_PIXELS} pixels, found {side} x {side}" in refused(bomb, vary=1)
    assert "No such file" in refused(tmp_path / "nothing.png", vary=1)
    assert "Not a regular file" in refused("/dev/zero", vary=1)
    assert "is no picture" in refused(b"text", vary=1)
    assert "expected a file or a picture, found 'int'" in refused(7, vary=1)
    assert "floating point" in refused(NOISE.convert("F"), vary=1)


def test_masks() -> None:
    source = source_of(MODEL, NOISE, box(10, 20, 40, 50))
    assert np.array_equal(source.drawn, np.asarray(box(10, 20, 40, 50)) > 0)
    touched = source.cells(MODEL.patch_nums)[-1][0]
    assert not touched[1:5, 2:7].any(), "a cell with one pixel to draw is drawn"
    assert touched.sum() == 64 - 4 * 5
    clear = NOISE.convert("RGBA")
    clear.putalpha(box(0, 0, 64, 32))
    assert np.array_equal(source_of(MODEL, clear).drawn, np.arange(64)[None] >= np.full((64, 1), 32))
    by_alpha = Image.new("RGBA", (64, 64))
    by_alpha.putalpha(box(0, 0, 64, 32))
    assert np.array_equal(source_of(MODEL, NOISE, by_alpha).drawn, source_of(MODEL, clear).drawn)
    assert "expected the picture's size, 64 x 64, found 3 x 5" in refused(NOISE, Image.new("L", (3, 5)))
    assert "black" in refused(NOISE, Image.new("L", (64, 64)))
    assert "nothing is said of what to draw" in refused(NOISE)


def test_what_is_under_transparent_pixels_does_not_show() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (0, 0, 32, 64))
    assert set(map(tuple, source_of(MODEL, image).pixels.reshape(-1, 3))) == {(255, 0, 0)}


def test_fits() -> None:
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (0, 0, 64, 64))
    mask = box(0, 0, 64, 64, (64, 128))
    cover, contain, stretch = (
        source_of(MODEL, wide, mask, fit=fit) for fit in ("cover", "contain", "stretch")
    )
    assert [s.drawn.mean() for s in (cover, stretch)] == [0.5, 0.5]
    assert contain.drawn.mean() == 0.75, "bars are drawn, too"
    assert np.array_equal(contain.pixels[0], contain.pixels[40])
    assert "expected one of cover, contain, stretch" in refused(wide, mask, fit="crop")


def test_margins_are_drawn() -> None:
    source = source_of(MODEL, NOISE, outpaint=(0, 0, 64, 64))
    kept = ~source.drawn
    assert kept[:32, :32].all()
    assert kept.sum() == 32 * 32
    both = source_of(MODEL, NOISE, outpaint=(32, 0, 32, 0))
    assert both.fit == "contain"
    assert both.drawn[:, :16].all()
    assert both.drawn[:16].all(), "and the bars that a square needs"
    for bad in ((1, 2), "wide", (1, 2, 3, -4), (1, 2, 3, 4.5)):
        assert "`outpaint`" in refused(NOISE, outpaint=bad)
    assert "`outpaint`: expected 1 to" in refused(NOISE, outpaint=(1 << 20, 0, 0, 0))


def test_scales() -> None:
    source = source_of(MODEL, NOISE, vary=2)
    assert [bool(cells.all()) for cells in source.cells(MODEL.patch_nums)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not source.paste
    for bad in (0, 5, 1.5, True):
        assert "`vary`: expected" in refused(NOISE, vary=bad)
    assert "found `mask`, `outpaint` or `anew` beside it" in refused(NOISE, vary=1, anew=1)
    anew = source_of(MODEL, NOISE, box(0, 0, 8, 8), anew=1).cells(MODEL.patch_nums)
    assert not anew[0].any()
    assert anew[1].any()


def test_pasting_is_byte_for_byte_and_its_border_lies_inside() -> None:
    source = source_of(MODEL, NOISE, box(10, 20, 40, 50))
    share = weights(source.drawn)
    assert np.array_equal(share > 0, source.drawn)
    assert (share[10, 20:50] == 0.5).all()
    assert (share[11:39, 21:49] == 1).all()
    image = RNG.random((1, 3, 64, 64), np.float32)
    found = (pasted(image, [source]) * 255).astype(np.uint8)[0].transpose(1, 2, 0)
    assert np.array_equal(found[~source.drawn], source.pixels[~source.drawn])
    inside = share == 1
    assert np.array_equal(found[inside], (image[0].transpose(1, 2, 0) * 255).astype(np.uint8)[inside])
    plain = source_of(MODEL, NOISE, box(10, 20, 40, 50), paste=False)
    assert np.array_equal(pasted(image, [plain]), image)


@pytest.mark.parametrize(
    "source",
    [
        source_of(MODEL, NOISE, box(3, 5, 40, 9), anew=1, paste=False),
        source_of(MODEL, NOISE, outpaint=(9, 8, 7, 6)),
        source_of(MODEL, NOISE, vary=3, fit="stretch"),
    ],
    ids=["mask", "outpaint", "vary"],
)
def test_a_record_brings_it_back(source: Source, tmp_path: Path) -> None:
    origin = Origin("a prompt", 3, SamplingSettings(), "demo", "0" * 64, picture=record_of(source))
    (tmp_path / "drawn.png").write_bytes(png_bytes(NOISE, origin))
    record = read_origin(tmp_path / "drawn.png").picture
    assert record == origin.picture
    assert record is not None
    again = source_again(record, MODEL, NOISE)
    assert np.array_equal(again.drawn, source.drawn)
    assert np.array_equal(again.pixels, source.pixels)
    names = ("vary", "anew", "paste", "fit", "outpaint", "sha256")
    assert [getattr(again, n) for n in names] == [getattr(source, n) for n in names]
    with pytest.raises(InputError, match="another picture than the one it was drawn from"):
        source_again(record, MODEL, NOISE.rotate(90))


@pytest.mark.parametrize("mask", ["", "!", "AAAA", "eJwDAAAAAAE=", "é"])
def test_a_damaged_record(mask: str) -> None:
    record = PictureRecord(plain_source(MODEL, NOISE).sha256, mask)
    with pytest.raises(InputError, match="what the picture tells of its mask is damaged"):
        source_again(record, MODEL, NOISE)
