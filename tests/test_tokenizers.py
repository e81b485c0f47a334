"""Tokenizer files of strangers: refused in a sentence before the tokenizers library lists what they lack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hart_runtime.common.errors import InputError
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, Bundle, open_bundle
from hart_runtime.runtime.text import open_tokenizer

LAST = 338
"""Number of the demo's last token."""
BEYOND = r"embedding has rows 0 to 338"
NO_FILE = r"not a tokenizer file \([^\n]+\)$"
Values = dict[str, Any]


@pytest.fixture
def change(demo_bundle: Path, tmp_path: Path) -> Callable[[Callable[[Values], object]], Bundle]:
    def changed(edit: Callable[[Values], object]) -> Bundle:
        bundle = open_bundle(demo_bundle)
        values = json.loads(bundle.path(TEXT_TOKENIZER).read_text(encoding="utf-8"))
        edit(values)
        raw = json.dumps(values).encode()
        (tmp_path / TEXT_TOKENIZER).write_bytes(raw)
        return replace(bundle, folder=tmp_path, tokenizer=raw)

    return changed


def number(place: object) -> Callable[[Values], object]:
    return lambda values: values["model"]["vocab"].update(circle=place)


CHANGES: dict[str, tuple[Callable[[Values], object], str]] = {
    "far beyond": (number(2**31), BEYOND),
    "one beyond": (number(LAST + 1), BEYOND),
    "negative": (number(-1), BEYOND),
    "a fraction": (number(1.5), BEYOND),
    "a truth value": (number(True), BEYOND),
    "text": (number("7"), BEYOND),
    "added": (lambda v: v["added_tokens"][0].update(id=LAST + 1), BEYOND),
    "added, as text": (lambda v: v["added_tokens"][0].update(id="0"), BEYOND),
    "padding": (lambda v: v["padding"].update(pad_id=2**31), BEYOND),
    "padding, null": (lambda v: v["padding"].update(pad_id=None), BEYOND),
    "post-processor": (
        lambda v: v.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<e>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {"<e>": {"id": "<e>", "ids": [LAST + 1], "tokens": ["<e>"]}},
            }
        ),
        BEYOND,
    ),
    "post-processor, a pair": (
        lambda v: v.update(post_processor={"type": "BertProcessing", "sep": ["x", 999], "cls": ["y", 1]}),
        BEYOND,
    ),
    "twice": (number(0), "have number 0"),
    "a merge of nothing": (lambda v: v["model"]["merges"].append(["nowhere", "either"]), NO_FILE),
    "another model": (lambda v: v["model"].update(type="Nothing"), NO_FILE),
    "words without end": (lambda v: v.update(added_tokens="x" * 10**6), NO_FILE),
    "a type without end": (lambda v: v["model"].update(type="x" * 10**6), NO_FILE),
    "a merge without end": (lambda v: v["model"]["merges"].append(["y" * 10**6, "z"]), NO_FILE),
    "no model": (lambda v: v.pop("model"), NO_FILE),
    "no padding": (lambda v: v.update(padding=None), "names no padding"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_bundle_has(
    change: Callable[[Callable[[Values], object]], Bundle],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """In a bundle, and in the checkpoint that one is made of."""
    edit, words = CHANGES[name]
    with pytest.raises(InputError, match=words) as caught:
        open_tokenizer(change(edit))
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match=words):
        read_vocabulary(tmp_path, LAST + 1)
    assert capfd.readouterr().out == ""


def test_gaps_are_not_listed(
    change: Callable[[Callable[[Values], object]], Bundle], capfd: pytest.CaptureFixture[str]
) -> None:
    """The library lists them to standard output when it writes a tokenizer out."""

    def edit(values: Values) -> None:
        word = next(key for key, place in values["model"]["vocab"].items() if place == LAST - 1)
        del values["model"]["vocab"][word]
        values["model"]["merges"] = [pair for pair in values["model"]["merges"] if "".join(pair) != word]

    ids, mask = open_tokenizer(change(edit))(["a red circle"])
    assert mask.sum() >= 3
    assert ids.max() <= LAST
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("prompt", ["a blue star", "!", "\u2603"])
def test_a_vocabulary_without_a_token(
    change: Callable[[Callable[[Values], object]], Bundle], prompt: str
) -> None:
    def edit(values: Values) -> None:
        values["model"] = {"type": "WordLevel", "vocab": {"red": 1}, "unk_token": "<none>"}
        values["added_tokens"] = []

    prompts = open_tokenizer(change(edit))
    with pytest.raises(InputError, match="the text tokenizer cannot read"):
        prompts([prompt])
    with pytest.raises(InputError, match="the text tokenizer cannot read"):
        prompts.cut_off(prompt)


def test_a_pointer_in_its_place(demo_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3310000000\n"
    for name in (TEXT_TOKENIZER, "weights.bin", "decoder.onnx", "manifest.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(pointer)
        with pytest.raises(InputError, match=rf"{name}: .*git-lfs pointer .*3,310\.0 MB.*git lfs pull"):
            open_bundle(folder)
        (folder / name).write_bytes(kept)
