"""PNG files: whole, read by others as they were meant, and written while the next picture is drawn."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hart_runtime.common.errors import RunError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.png import MOST_WAITING, Origin, PngWriter, read_origin, save_png

ORIGIN = Origin('a gr\u00fcn \u5186\x00\n"circle"', 3, SamplingSettings(), "b", "i")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 9))
def test_another_reader_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, seed: int
) -> None:
    file, image = tmp_path_factory.mktemp("png") / "x.png", picture(width, height, seed)
    save_png(image, file, ORIGIN)
    with Image.open(file) as read:
        read.verify()
    with Image.open(file) as read:
        assert (read.mode, read.size) == ("RGB", image.size)
        assert np.array_equal(np.asarray(read), np.asarray(image))
        assert read.info["Description"] == ORIGIN.prompt
    assert read_origin(file) == ORIGIN
    if os.name != "nt":
        (plain := file.with_name("plain")).touch()
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_next_picture_does_not_wait_for_the_file(tmp_path: Path) -> None:
    image, files = picture(1024, 1024), [tmp_path / f"{i}.png" for i in range(MOST_WAITING + 2)]
    with PngWriter() as writer:
        for file in files[:MOST_WAITING]:
            writer.save(image, file, ORIGIN)
        assert not files[MOST_WAITING - 1].exists()
        for file in files[MOST_WAITING:]:
            writer.save(image, file, ORIGIN)
        assert files[0].exists(), "no more than some wait in memory"
    assert writer.written == files
    assert [read_origin(file) for file in files] == [ORIGIN] * len(files)


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """When the next one comes, or at the end; what can be written is."""
    good, bad = tmp_path / "good.png", tmp_path / "none" / "bad.png"
    writer = PngWriter()
    writer.save(picture(4, 4), good, ORIGIN)
    writer.save(picture(4, 4), bad, ORIGIN)
    with pytest.raises(RunError, match=r"the folder .*none does not exist"), writer:
        pass
    assert writer.written == [good]
    assert [file.name for file in tmp_path.iterdir()] == ["good.png"]
