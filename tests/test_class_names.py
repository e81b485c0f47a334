"""Classes by number and by name: what is meant, and what is said where that cannot be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hart_runtime.common.errors import InputError
from hart_runtime.export.request import IMAGENET
from hart_runtime.runtime.class_names import ClassNames, Label, read_class_names
from tests.var_models import NAMES, write_names

NAMED, BARE = ClassNames(len(NAMES), NAMES), ClassNames(len(NAMES))
IMAGES = ClassNames(1000, read_class_names(IMAGENET, 1000))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (2, 2),
        ("2", 2),
        (np.int64(2), 2),
        ("golden retriever", 2),
        ("  Golden Retriever ", 2),
        ("golden retriever (2)", 2),
        ("crane bird", 0),
        ("crane (4)", 4),
        ("crane (0)", 0),
        ("cup", 5),
        ("none", 7),
        ("None", 7),
    ],
)
def test_what_is_meant(label: Label, number: int) -> None:
    assert NAMED.number(label) == number
    assert NAMED.number(NAMED.words(label)) == number, "the full name stands for it alone"
    assert NAMED([label, 0])["label"].tolist() == [number, 0]


@pytest.mark.parametrize(
    ("classes", "label", "words"),
    [
        (NAMED, "crane", "2 classes have this name; give 0 (crane bird) or 4 (crane)"),
        (NAMED, "retriever", "near it: golden retriever (2), Labrador retriever (3)"),
        (NAMED, "golden retreiver", "near it: golden retriever (2)"),
        (NAMED, "xylophone", "there is no class of this name among 7"),
        (NAMED, "crane (2)", "there is no class of this name"),
        (NAMED, 7, "class 7: expected 0 to 6, or 'none' for a picture of no class"),
        (NAMED, "-1", "class -1: expected 0 to 6"),
        (NAMED, True, "expected the number or the name of a class, found True"),
        (NAMED, 1.5, "found 1.5"),
        (NAMED, None, "found None"),
        (BARE, "cup", "holds no names of classes; expected a number from 0 to 6, or export it again with"),
        (IMAGES, "crane", "give 134 (crane bird) or 517 (crane)"),
        (IMAGES, "maillot", "give 638 (maillot) or 639 (maillot tank suit)"),
        (IMAGES, "cardigan", "give 264 (Cardigan) or 474 (cardigan)"),
        (IMAGES, "goldn retriever", "golden retriever (207)"),
    ],
)
def test_what_is_said(classes: ClassNames, label: Label, words: str) -> None:
    with pytest.raises(InputError) as caught:
        classes.number(label)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


def test_every_class_of_imagenet_has_words_of_its_own() -> None:
    words = [IMAGES.words(number) for number in range(1000)]
    assert [IMAGES.number(word) for word in words] == [*range(1000)]
    assert (IMAGES.words("207"), IMAGES.words("none")) == ("golden retriever (207)", "none")
    assert BARE.words(3) == "3"


def test_a_file_as_editors_save_it(tmp_path: Path) -> None:
    file = write_names(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read_class_names(file, len(NAMES)) == NAMES
