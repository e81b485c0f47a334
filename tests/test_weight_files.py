"""Weight files as people have them: sharded, linked, by other names, cut off, damaged, something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.hart.checkpoint import load_hart
from tests.checkpoint_copies import (
    PARTS,
    WEIGHTS,
    State,
    dry,
    head,
    load,
    pickled,
    plain,
    refused,
)


def shard(root: Path, part: str, change: Callable[[dict[str, State], dict[str, str]], None]) -> None:
    """Two shards with their index, after ``change`` of what is in them and of what the index says."""
    folder = root / part
    state = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    keys = sorted(state)
    shards = {
        f"model-0000{n + 1}-of-00002.safetensors": {key: state[key] for key in keys[n::2]} for n in range(2)
    }
    places = {key: name for name, held in shards.items() for key in held}
    change(shards, places)
    for name, held in shards.items():
        save_file(held, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_the_index_decides(root: Path, part: str, name: str) -> None:
    def stale(shards: dict[str, State], places: dict[str, str]) -> None:
        key = next(key for key in places if key.endswith(name))
        for held in shards.values():
            held.setdefault(key, torch.full([1], float("nan")))

    shard(root, part, stale)
    load(root, torch.float32)
    dry(root)


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shards, places: places.update(extra=SECOND), ("extra is in", "does not hold it")),
        (lambda shards, places: shards[SECOND].update(extra=torch.ones(1)), ("extra: is not named by",)),
        (lambda shards, places: shards.pop(SECOND), ("names the shard", "which is not in")),
        (lambda shards, places: places.update(x="../x.safetensors"), ("expected names of files",)),
        (lambda shards, places: places.update(x=5), ("expected names of files, found 5",)),
        (lambda shards, places: places.clear(), ("expected a weight_map",)),
        (
            lambda shards, places: shards.update({"model-00003-of-00003.safetensors": {"x": torch.ones(1)}}),
            ("does not name model-00003-of-00003.safetensors",),
        ),
    ],
)
def test_an_index_that_is_not_true(root: Path, part: str, change: Any, words: tuple[str, ...]) -> None:
    shard(root, part, change)
    refused(root, f"{WEIGHTS}.index.json", *words)


@pytest.mark.parametrize("name", ["x" * 5000, "..", "a\0b", "モ" * 200])
def test_shards_of_impossible_names(root: Path, name: str) -> None:
    shard(root, "llm", lambda shards, places: places.update({"head.bias": name}))
    refused(root, f"{WEIGHTS}.index.json: names the shard '", "which is not in")


def test_shards_alone_and_links_to_nothing(root: Path) -> None:
    shard(root, "llm", lambda shards, places: None)
    (root / "llm" / f"{WEIGHTS}.index.json").unlink()
    refused(root, "beside shards")
    (root / "llm" / WEIGHTS).symlink_to("../../blobs/gone")
    refused(root, "is a link to '../../blobs/gone'")


CAPITALS = ["MODEL.SAFETENSORS", "Model.SafeTensors", "PYTORCH_MODEL.BIN", "Weights.PTH", "EMA.PT"]


@pytest.mark.parametrize("name", CAPITALS)
def test_capitals_are_small_letters(root: Path, name: str) -> None:
    state = plain(root)
    (root / "llm" / WEIGHTS).unlink()
    (save_file if name.lower().endswith("safetensors") else torch.save)(state, root / "llm" / name)
    torch.save({"lr": 0.1}, root / "llm" / "OPTIMIZER.PT")
    assert torch.equal(head(root), state["head.weight"].float())
    (root / "llm" / name).write_bytes(b"")
    refused(root, f"{name}: is empty")


def test_shards_and_index_in_capitals(root: Path) -> None:
    expected = plain(root)["head.weight"].float()
    shard(root, "llm", lambda shards, places: None)
    index = root / "llm" / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {key: name.upper() for key, name in places.items()}}))
    for file in (root / "llm").glob("model*"):
        file.rename(file.with_name(file.name.upper()))
    assert torch.equal(head(root), expected)
    (root / "llm" / "MODEL-00003-OF-00003.SAFETENSORS").write_bytes(b"")
    refused(root, "does not name MODEL-00003-OF-00003.SAFETENSORS")


@pytest.mark.parametrize("name", ["model.pth", "weights.pt", "pytorch_model.bin"])
def test_weights_by_other_names(root: Path, name: str) -> None:
    state = plain(root)
    pickled(root, state, name)
    torch.save({"lr": 0.1}, root / "llm" / "optimizer.pt")
    assert torch.equal(head(root), state["head.weight"].float())


def test_a_pickle_by_another_name(root: Path) -> None:
    pickled(root, plain(root), WEIGHTS)
    refused(root, "is a file of PyTorch's under another name")


def test_names_among_which_no_rule_decides(root: Path) -> None:
    state = plain(root)
    for name in ("last.pth", "best.pth"):
        pickled(root, state, name)
    refused(root, "several weights", "best.pth, last.pth")


def test_the_cache_of_the_hub(root: Path, tmp_path: Path) -> None:
    expected = plain(root)["head.weight"].float()
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(root.rglob("*.*"))):
        if file.is_file():
            blob = file.rename(tmp_path / "blobs" / str(number))
            file.symlink_to(blob)
            blob.chmod(0o444)
    assert torch.equal(head(root), expected)
    dry(root)


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor such devices")
@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("thing", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_weights_that_have_no_end(root: Path, part: str, thing: Callable[[Path], None]) -> None:
    """They are refused, and not waited for."""
    (root / part / WEIGHTS).unlink()
    thing(root / part / WEIGHTS)
    refused(root, "found a device or a FIFO")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3310000000\n"


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), "is a git-lfs pointer and not the file itself (3,310.0 MB); run: git lfs pull"),
        (POINTER.replace("\n", "\r\n").encode(), "git lfs pull"),
        (b"\xef\xbb\xbf<!doctype html><html>", "is a web page"),
        (b"Entry not found", "is text and no weight file, it begins with 'Entry not found'"),
        (b'{"error": "Invalid username or password."}', "is text and no weight file"),
        (b"", "is empty"),
        (bytes(5000), "begins with zeros"),
        (b"GGUF\x03\0\0\0" + bytes(100), "is no safetensors file"),
    ],
)
def test_files_that_are_something_else(root: Path, part: str, content: bytes, words: str) -> None:
    (root / part / WEIGHTS).write_bytes(content)
    refused(root, f"{part}/{WEIGHTS}: ", words)


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("left", [5, 100, 10_000, -1, -4096])
def test_downloads_that_ended_early(root: Path, part: str, left: int) -> None:
    file = root / part / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    missing = f"{-left:,} bytes are missing (expected {len(whole):,}" if left < -1 else ""
    refused(root, f"{part}/{WEIGHTS}", missing)
    file.write_bytes(whole + b"more")
    refused(root, "is 4 bytes longer than its header says")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "anything.pt"])
def test_pickles_that_ended_early(root: Path, name: str) -> None:
    pickled(root, plain(root), name)
    file = root / "llm" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is cut off, at least ([\d,]+) bytes are missing") as caught:
        dry(root)
    count = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    assert 0.8 < count / (len(whole) - len(whole) // 2) <= 1
    file.write_bytes(whole[:-10])
    refused(root, name, "is cut off, its end is missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "ema_model.bin"])
@pytest.mark.parametrize("change", [b"\0" * 512, b"\x7f" * 3, b"\xff"])
def test_pickles_with_a_hole(root: Path, name: str, change: bytes) -> None:
    """A dry run reads no weights; an export does."""
    pickled(root, plain(root), name)
    file = root / "llm" / name
    whole = file.read_bytes()
    half = len(whole) // 2
    file.write_bytes(whole[:half] + change + whole[half + len(change) :])
    with pytest.raises(InputError, match=r"is not as it was written; download it again") as caught:
        load_hart(find_checkpoint(root))
    assert str(file) in str(caught.value)
    file.write_bytes(whole)
    load_hart(find_checkpoint(root))


def test_checksums_that_were_left_out_are_not_missed(root: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        pickled(root, plain(root), "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    load_hart(find_checkpoint(root))


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
def test_a_header_that_names_a_tensor_twice(root: Path, part: str) -> None:
    file = root / part / WEIGHTS
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    name = sorted(header.keys() - {"__metadata__"})[0]
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    file.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + raw[end:])
    refused(root, f"{file}: stores {name!r} twice")
