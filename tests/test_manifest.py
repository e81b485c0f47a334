"""Manifests that are well formed and wrong: every one is refused with a sentence that says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_runtime.common.errors import InputError, shown
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.manifest import check_contract, read_manifest

Values = dict[str, Any]
Change = Callable[[Values], object]


def at(*path: str | int, value: Any) -> Change:
    """Put a value somewhere."""

    def change(values: Any) -> None:
        *way, last = path
        for step in way:
            values = values[step]
        values[last] = value

    return change


def without(*path: str | int) -> Change:
    def change(values: Any) -> None:
        *way, last = path
        for step in way:
            values = values[step]
        del values[last]

    return change


SAMPLE = ("graphs", "sample", "inputs", 0)
PYRAMID = ("checkpoint", "llm", "patch_nums")
CHANGES: dict[str, tuple[Change, str]] = {
    "an extent that is not the weights'": (at("model", "extent", value=2), "over an extent of 2: expected"),
    "a larger extent": (at("model", "extent", value=16), "over an extent of 16: expected"),
    "another side of a scale": (at("model", "patch_nums", 1, value=3), ": patch_nums"),
    "another side that the weights know": (at(*PYRAMID, 1, value=3), "as the weights know"),
    "another extent that the weights know": (at(*PYRAMID, -1, value=99), "as the weights know"),
    "weights that know no scales": (at(*PYRAMID, value=[]), "patch_nums: expected sides, found []"),
    "weights that know no sides": (at(*PYRAMID, -1, value=0), "patch_nums: expected sides"),
    "known sides that are text": (at(*PYRAMID, value="1_2_3"), "patch_nums: expected a list"),
    "a type that there is not": (at(*SAMPLE, "dtype", value="float33"), "hidden float33"),
    "a dimension that is a list": (
        at(*SAMPLE, "shape", 1, value=[7]),
        "inputs[0].shape[1]: expected a whole",
    ),
    "a dimension without a name": (at(*SAMPLE, "shape", 1, value="?"), "hidden float32 ['guided', '?'"),
    "a dimension that takes a day": (at(*SAMPLE, "shape", 1, value="9**9**9**9"), "expected hidden"),
    "a shape that is text": (at(*SAMPLE, "shape", value="batch"), "inputs[0].shape: expected a list"),
    "a name that is a number": (at(*SAMPLE, "name", value=7), "inputs[0].name: expected text, found 7"),
    "an input without a type": (without(*SAMPLE, "dtype"), "inputs[0]: dtype is missing"),
    "a graph without inputs": (without("graphs", "sample", "inputs"), "graphs.sample: inputs is missing"),
    "graphs in a list": (at("graphs", value=[]), "graphs: expected an object, found []"),
    "a graph that is null": (at("graphs", "sample", value=None), "graphs.sample: expected an object"),
    "an opset that is text": (at("graphs", "sample", "opset", value="23"), "opset: expected a whole number"),
    "a field of a later version": (at("colour", value=1), "unknown colour; a newer version"),
    "one of a graph": (at("graphs", "sample", "colour", value=1), "graphs.sample: unknown colour"),
    "a network in a list": (at("checkpoint", "llm", value=[]), "checkpoint.llm: expected an object"),
    "a network that is null": (
        at("checkpoint", "tokenizer", value=None),
        "checkpoint.tokenizer: expected an",
    ),
    "a network of nobody": (at("checkpoint", "llm", value={}), "checkpoint: attn_type"),
    "a width of nobody": (at("checkpoint", "tokenizer", "ch", value="32"), "checkpoint: ch"),
    "text without a size": (
        without("checkpoint", "text_encoder", "hidden_size"),
        "checkpoint: missing hidden_size",
    ),
    "no text network": (without("checkpoint", "text_encoder"), "checkpoint.text_encoder: expected an object"),
    "a vocabulary in words": (
        at("checkpoint", "text_encoder", "vocab_size", value="339"),
        "vocab_size: expected",
    ),
    "an empty vocabulary": (
        at("checkpoint", "text_encoder", "vocab_size", value=0),
        "vocab_size: expected 1 to",
    ),
    "no source": (without("checkpoint", "source"), "checkpoint.source: expected text"),
    "negative depth": (at("model", "depth", value=-1), "model: depth: expected 1 to 512, found -1"),
    "depth without end": (at("model", "depth", value=10**9), "model: depth: expected 1 to 512"),
    "depth that is a fraction": (at("model", "depth", value=6.0), "model.depth: expected a whole number"),
    "depth that is true": (at("model", "depth", value=True), "model.depth: expected a whole number"),
    "depth that is text": (
        at("model", "depth", value="6"),
        "model.depth: expected a whole number, found '6'",
    ),
    "depth in a list": (at("model", "depth", value=[6]), "model.depth: expected a whole number"),
    "another depth": (at("model", "depth", value=7), "expected past_key_6 float16"),
    "sides that shrink": (
        at("model", "patch_nums", value=[1, 3, 2, 4, 8]),
        "patch_nums: expected sides that",
    ),
    "no sides": (at("model", "patch_nums", value=[]), "expected sides that do not shrink, found []"),
    "sides that are text": (at("model", "patch_nums", value="1,2"), "model.patch_nums: expected a list"),
    "heads that do not divide": (at("model", "num_heads", value=5), "embed_dim: expected a multiple"),
    "a size between cells": (at("model", "image_size", value=100), "image_size: expected a multiple"),
    "a batch of none": (at("max_batch", value=0), "max_batch: expected 1 to 64, found 0"),
    "a batch without end": (at("max_batch", value=10**12), "max_batch: expected 1 to 64"),
    "a precision that there is not": (
        at("precision", value="fp4"),
        "precision: expected one of fp32, fp16, int8",
    ),
    "a family that there is not": (
        at("family", value="dalle"),
        "family: expected one of hart, var, class-hart, mar, found 'dalle'",
    ),
    "guidance that is no number": (at("sampling", "guidance", value=float("nan")), "guidance"),
    "guidance without end": (at("sampling", "guidance", value=float("inf")), "guidance"),
    "guidance that is text": (at("sampling", "guidance", value="strong"), "guidance"),
    "a setting that there is not": (at("sampling", "colour", value=1), "unknown colour"),
    "sampling of nothing": (
        at("sampling", value={}),
        "sampling: no guidance, residual, smooth, steps, top_k, top_p among its settings",
    ),
    "a setting less": (
        at("sampling", value={"guidance": 1.0, "top_k": 5, "top_p": 0.5, "smooth": False, "residual": True}),
        "sampling: no steps among its settings",
    ),
    "sampling that is null": (at("sampling", value=None), "sampling: expected an object, found None"),
    "more codes than there are": (at("sampling", "top_k", value=10**6), "sampling: top_k: expected 1 to 512"),
    "files in a list": (at("files", value=["weights.bin"]), "files: expected an object"),
    "a size that is text": (
        at("files", "weights.bin", "size", value="1"),
        "weights.bin.size: expected a whole",
    ),
    "a negative size": (
        at("files", "weights.bin", "size", value=-1),
        "files: 'weights.bin': expected a hash",
    ),
    "one hash too many": (
        at("files", "weights.bin", "sha256", value=["0" * 64] * 2),
        "files: 'weights.bin': expected a hash for each piece, found 2",
    ),
    "a hash of two lines": (at("files", "weights.bin", "sha256", 0, value="a\nb"), "expected 64 digits"),
    "a hash of capitals": (
        at("files", "weights.bin", "sha256", 0, value="A" * 64),
        "expected 64 digits of a sha256, found 'AAA",
    ),
    "half a hash": (
        at("files", "weights.bin", "sha256", 0, value="0" * 32),
        "expected 64 digits of a sha256",
    ),
    "a hash that is text": (at("files", "weights.bin", "sha256", value="0" * 64), "sha256: expected a list"),
    "no origin": (at("checkpoint", value=None), "checkpoint: expected an object, found None"),
    "an origin without weights": (at("checkpoint", "weights", value=None), "checkpoint.weights: expected"),
    "weights of nothing": (at("checkpoint", "weights", value={}), "checkpoint.weights: llm is missing"),
    "a prompt of no tokens": (
        at("checkpoint", "system_prompt", value={"sha256": "0", "tokens": "many"}),
        "system_prompt.tokens: expected a list",
    ),
    "half of a character": (at("name", value="\ud800"), "name: expected text, found half of a character"),
    "a noise that is text": (at("noise", value="1"), "noise: expected a whole number"),
    "a name without end": (at("name", value="x" * 10**6), "name: expected at most 255 characters"),
    "a version without end": (at("tools", "torch", value="2." * 10**5), "tools.torch: expected at most 255"),
    "a shape without end": (at(*SAMPLE, "shape", value=[1] * 10**5), "hidden float32 [1, 1, 1"),
    "graphs without end": (
        lambda values: values["graphs"].update({f"g{n}": values["graphs"]["sample"] for n in range(10**4)}),
        "and 9995 more unknown",
    ),
    "a number without end": (at(*SAMPLE, "shape", 1, value=10**400), "inputs[0].shape[1]: expected"),
    "a schema that is true": (at("schema", value=True), "expected a schema number, found True"),
    "a schema without end": (at("schema", value={"of": ["x"] * 10**5}), "schema number, found {'of': ['x'"),
    "a schema of many digits": (at("schema", value=10**900), "is newer than the"),
    "a noise of many digits": (at("noise", value=10**900), "noise: expected"),
}


@pytest.fixture(scope="module")
def values(demo_bundle: Path) -> Values:
    found: Values = json.loads((demo_bundle / MANIFEST).read_text(encoding="utf-8"))
    return found


def read(values: Values, folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    manifest, _ = read_manifest(folder)
    check_contract(manifest, str(folder / MANIFEST))


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_and_where(values: Values, tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    changed = json.loads(json.dumps(values))
    change(changed)
    with pytest.raises(InputError) as caught:
        read(changed, tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / MANIFEST))
    assert words in message
    assert message.endswith(("export the bundle again", f"found {shown(changed['schema'])}"))
    assert "\n" not in message
    assert len(message) < 1000


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place of a JSON value."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [p for key, item in items for p in ((*path, key), *places(item, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_junk_anywhere_is_refused_or_changes_nothing_that_is_read(
    values: Values, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "junk"
    folder.mkdir(exist_ok=True)
    changed = json.loads(json.dumps(values))
    at(*data.draw(st.sampled_from(places(changed))), value=data.draw(JUNK))(changed)
    try:
        read(changed, folder)
    except InputError as error:
        assert str(error).startswith(str(folder / MANIFEST))  # noqa: PT017
    finally:
        shutil.rmtree(folder)
