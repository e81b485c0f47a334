"""Weights as people have them: wrapped, nested, sharded, averaged, cut off, of other types, no numbers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hart_runtime.common.checkpoint import Checkpoint, Network, find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.hart.checkpoint import (
    check_hart,
    check_text_encoder,
    load_hart,
    load_text_encoder,
)
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from tests.golden_runs import HERE

State = dict[str, Tensor]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3310000000\n"
WEIGHTS = "model.safetensors"
PROJ, BIAS, CODES = "blocks.0.attn.proj.weight", "head.bias", "vae.quantize.embedding.weight"
TEXT_WEIGHT = "layers.0.self_attn.q_proj.weight"
PARTS = [("llm", PROJ), ("llm", BIAS), ("tokenizer", CODES), ("text_encoder", TEXT_WEIGHT)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Recorded networks without averaged weights, and the demo's text encoder, in a path of the world."""
    root = tmp_path / "a [model] モデル"
    shutil.copytree(HERE / "t2i_main", root, ignore=shutil.ignore_patterns("golden", "ema_model.bin"))
    shutil.copytree(DEMO_CHECKPOINT / "text_encoder", root / "text_encoder")
    return root


def edit(root: Path, part: str, change: Callable[[State], State | None]) -> None:
    file = root / part / WEIGHTS
    state = {key: value.clone() for key, value in load_file(file).items()}
    save_file(change(state) or state, file)


def pickled(root: Path, state: Any, name: str = "pytorch_model.bin") -> None:
    (root / "llm" / WEIGHTS).unlink(missing_ok=True)
    torch.save(state, root / "llm" / name)


def plain(root: Path) -> State:
    return load_file(root / "llm" / WEIGHTS)


def head(root: Path, ema: bool | None = None) -> Tensor:
    found = find_checkpoint(root, ema=ema)
    check_hart(found)
    return load_hart(found).transformer.head.weight


def load(root: Path, dtype: torch.dtype) -> None:
    found = find_checkpoint(root)
    load_hart(found, dtype)
    load_text_encoder(network(found), dtype)


def network(found: Checkpoint) -> Network:
    assert found.text_encoder is not None
    return found.text_encoder


def dry(root: Path) -> None:
    """What a dry run looks at."""
    found = find_checkpoint(root)
    check_hart(found)
    check_text_encoder(network(found))


def refused(root: Path, *words: str) -> None:
    """By what loads and by a dry run, in the same words."""
    said = []
    for function in (lambda: load(root, torch.float32), lambda: dry(root)):
        with pytest.raises(InputError) as caught:
            function()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert [word for word in words if word not in said[0]] == []
    assert "\n" not in said[0]
    assert len(said[0]) < 1500


@pytest.mark.parametrize(("part", "name"), PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(root: Path, part: str, name: str, value: float) -> None:
    def change(state: State) -> None:
        key = next(key for key in state if key.endswith(name))
        state[key].view(-1)[-1] = value

    edit(root, part, change)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(InputError, match="holds NaN or infinity, 1 of ") as caught:
            load(root, dtype)
        assert f"{root / part / WEIGHTS}: " in str(caught.value)
        assert name in str(caught.value)
    dry(root)  # reads no values


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("llm", PROJ, 7e4),
        ("llm", BIAS, -1e9),
        ("tokenizer", "decoder.conv_out.weight", 3e38),
        ("text_encoder", TEXT_WEIGHT, 65520.0),
    ],
)
def test_values_beyond_half(root: Path, part: str, name: str, value: float) -> None:
    def change(state: State) -> None:
        key = next(key for key in state if key.endswith(name))
        state[key] = state[key].to(torch.bfloat16 if value < 0 else torch.float32)
        state[key].view(-1)[0] = value

    edit(root, part, change)
    load(root, torch.float32)
    with pytest.raises(InputError, match=r"beyond the 65504 of float16; give `precision='fp32'`") as caught:
        load(root, torch.float16)
    assert name in str(caught.value)


@pytest.mark.parametrize(("part", "name"), [PARTS[0], PARTS[3], ("llm", "ffn.up_proj.weight")])
def test_values_below_half_are_told_of(
    root: Path, part: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def change(state: State) -> None:
        key = next(key for key in state if key.endswith(name))
        state[key] = state[key].float() * 1e-8

    edit(root, part, change)
    load(root, torch.float32)
    assert caplog.records == []
    load(root, torch.float16)
    (record,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert name in record
    assert "too small for float16" in record


KINDS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "name"), PARTS)
def test_types_that_are_no_weights(root: Path, part: str, name: str, kind: torch.dtype) -> None:
    def change(state: State) -> None:
        key = next(key for key in state if key.endswith(name))
        state[key] = state[key].float().to(kind)

    edit(root, part, change)
    refused(root, name, "expected float64, float32, bfloat16, float16, found", str(root / part))


@pytest.mark.parametrize("kind", ["quantized", "sparse", "meta", "nested"])
def test_tensors_that_are_no_arrays(root: Path, kind: str) -> None:
    state = plain(root)
    weight = state[PROJ].float()
    makers: dict[str, Callable[[], Tensor]] = {
        "quantized": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse": weight.to_sparse,
        "meta": lambda: weight.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([weight[:1], weight[1:]]),
    }
    state[PROJ] = makers[kind]()
    pickled(root, state)
    refused(root, "pytorch_model.bin")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_that_are(root: Path, kind: torch.dtype) -> None:
    state = {
        key: value.to(kind) if value.is_floating_point() else value for key, value in plain(root).items()
    }
    expected = state["head.weight"].float()
    save_file(state, root / "llm" / WEIGHTS)
    assert torch.equal(head(root), expected)


def below(state: State, *prefixes: str) -> State:
    return {"".join(prefixes) + key: value for key, value in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "module": lambda s: below(s, "module."),
    "compiled": lambda s: below(s, "_orig_mod."),
    "both": lambda s: below(s, "module.", "_orig_mod."),
    "twice": lambda s: below(s, "_orig_mod.", "module.", "module."),
    "lightning": lambda s: {"state_dict": below(s, "model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "inside": lambda s: {k.replace("attn.", "_fsdp_wrapped_module.attn.", 1): v for k, v in s.items()},
    "state_dict": lambda s: {"state_dict": s, "step": torch.tensor(7)},
    "model": lambda s: {"model": below(s, "module."), "optimizer": {"state": {0: {"exp_avg": s[BIAS]}}}},
    "ema": lambda s: {"ema": s, "decay": 0.999},
    "trainer": lambda s: {"trainer": {"var_wo_ddp": s, "vae": {"quantize.x": s[BIAS]}}, "args": {"a": "b"}},
    "counted": lambda s: {**below(s, "module."), "n_averaged": torch.tensor(5)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_dicts(root: Path, name: str) -> None:
    state = plain(root)
    pickled(root, WRAPPED[name](state))
    assert torch.equal(head(root), state["head.weight"].float())


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "net.model."])
def test_prefixes_of_every_network(root: Path, part: str, prefix: str) -> None:
    edit(root, part, lambda state: below(state, prefix))
    load(root, torch.float32)
    dry(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"state_dict": s, "model": s}, ("several sets of weights", "state_dict", "model")),
        (lambda s: {"model": s, "ema": s}, ("several sets of weights", "'model' and 'ema'")),
        (lambda s: {**below(s, "ema_model."), **below(s, "online_model.")}, ("several sets of weights",)),
        (lambda s: {**s, "module.head.bias": s[BIAS]}, ("module.head.bias: is stored twice", "head.bias")),
        (lambda s: {"model": {k: v for k, v in s.items() if k != BIAS}}, ("missing: head.bias",)),
        (lambda s: {f"x{i}.{k}": v for i, (k, v) in enumerate(s.items())}, ("missing", "more")),
        (lambda s: {"epoch": 3, "lr": 0.1}, ("expected a dictionary of tensors",)),
        (lambda s: [s[BIAS]], ("expected a dictionary of tensors",)),
    ],
)
def test_state_dicts_that_say_too_little(
    root: Path, change: Callable[[State], Any], words: tuple[str, ...]
) -> None:
    pickled(root, change(plain(root)))
    refused(root, "pytorch_model.bin", *words)


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


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_the_index_decides(root: Path, part: str, name: str) -> None:
    def stale(shards: dict[str, State], places: dict[str, str]) -> None:
        key = next(key for key in places if key.endswith(name))
        for held in shards.values():
            held.setdefault(key, torch.full([1], float("nan")))

    shard(root, part, stale)
    load(root, torch.float32)
    dry(root)


SECOND = "model-00002-of-00002.safetensors"


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


def test_shards_alone_and_links_to_nothing(root: Path) -> None:
    shard(root, "llm", lambda shards, places: None)
    (root / "llm" / f"{WEIGHTS}.index.json").unlink()
    refused(root, "beside shards")
    (root / "llm" / WEIGHTS).symlink_to("../../blobs/gone")
    refused(root, "is a link to '../../blobs/gone'")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor such devices")
@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("thing", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_weights_that_have_no_end(root: Path, part: str, thing: Callable[[Path], None]) -> None:
    """They are refused, and not waited for."""
    (root / part / WEIGHTS).unlink()
    thing(root / part / WEIGHTS)
    refused(root, "found a device or a FIFO")


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


def averaged_as(name: str, save: Callable[[State, Path], object]) -> Callable[[State, Path], object]:
    def write(state: State, llm: Path) -> None:
        (llm / name).parent.mkdir(exist_ok=True)
        save(state, llm / name)

    return write


AVERAGED = {
    name: averaged_as(name, save_file if name.endswith("safetensors") else torch.save)
    for name in ("ema_model.bin", "ema_model.safetensors", "ema.pt", "model_ema.pth", "ema/model.safetensors")
}


def averaged_shards(state: State, llm: Path) -> None:
    places: dict[str, str] = {}
    for number in range(2):
        name = f"ema_model-0000{number + 1}-of-00002.safetensors"
        held = {key: state[key] for key in sorted(state)[number::2]}
        save_file(held, llm / name)
        places |= dict.fromkeys(held, name)
    (llm / "ema_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("name", [*AVERAGED, "sharded"])
def test_averaged_weights_in_any_form(root: Path, name: str) -> None:
    state = plain(root)
    averaged = {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}
    AVERAGED.get(name, averaged_shards)(averaged, root / "llm")
    for ema in (None, True):
        assert torch.equal(head(root, ema), averaged["head.weight"].float())
        assert find_checkpoint(root, ema=ema).averaged
    found = find_checkpoint(root, ema=False)
    assert torch.equal(head(root, ema=False), state["head.weight"].float())
    assert not found.averaged
    assert found.llm.weights.passed_over


@pytest.mark.parametrize("name", ["model_non_ema.bin", "schema.bin", None])
def test_averaged_weights_that_are_not_there(root: Path, name: str | None) -> None:
    if name:
        torch.save(plain(root), root / "llm" / name)
    head(root)
    with pytest.raises(InputError, match="`ema`: expected averaged weights"):
        head(root, ema=True)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("llm", {"patch_nums": None}),
        ("llm", {"patch_nums": [1, 2, 3, 4, 5]}),
        ("llm", {"patch_nums": [1, 2, 3, 6, 4]}),
        ("llm", {"context_token": 13}),
        ("llm", {"context_token": 10, "patch_nums": [1, 2, 3, 4, 6]}),
    ],
)
def test_tables_tell_of_another_configuration(root: Path, part: str, changes: dict[str, Any]) -> None:
    file = root / part / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    refused(root, "context_token", "patch_nums", str(file))


@pytest.mark.parametrize("name", ["lvl_1L", "attn_bias_for_masking"])
def test_each_table_alone(root: Path, name: str) -> None:
    def change(state: State) -> State:
        return {k: v for k, v in state.items() if k == name or k not in ("lvl_1L", "attn_bias_for_masking")}

    edit(root, "llm", change)
    load(root, torch.float32)
    file = root / "llm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "context_token": 20}))
    refused(root, name, "context_token 20")


@pytest.mark.parametrize("part", ["llm", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("name", ["two\nlines", "long" * 2000, "`tick`", "\x1b[31mred"])
def test_names_of_any_kind_in_one_sentence(root: Path, part: str, name: str) -> None:
    edit(root, part, lambda state: {**state, name: torch.ones(3)})
    with pytest.raises(InputError) as caught:
        dry(root)
    said = str(caught.value)
    assert "unexpected: '" in said
    assert said.isprintable()
    assert "`" not in said
    assert len(said) < 1000


@pytest.mark.parametrize("value", [1e300, -1e39, 4e38])
def test_values_that_no_precision_holds(root: Path, value: float) -> None:
    def change(state: State) -> None:
        state[PROJ] = state[PROJ].double()
        state[PROJ].view(-1)[0] = value

    edit(root, "llm", change)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(InputError, match=f"{PROJ}: .* no precision holds it"):
            load(root, dtype)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float16])
def test_a_table_of_levels_in_any_type(root: Path, kind: torch.dtype) -> None:
    edit(root, "llm", lambda state: {**state, "lvl_1L": state["lvl_1L"].to(kind)})
    dry(root)
    edit(root, "llm", lambda state: {**state, "lvl_1L": state["lvl_1L"].flip(1).contiguous()})
    refused(root, "lvl_1L: holds other levels", "patch_nums")


def itself(state: State) -> dict[str, Any]:
    """Dictionaries that hold themselves many times."""
    loop: dict[str, Any] = {}
    loop.update({f"loop{number}": loop for number in range(50)})
    return {"state_dict": state, "loop": loop}


def shared(state: State) -> dict[str, Any]:
    """The same few dictionaries, reached in more ways than can be tried."""
    inner: dict[str, Any] = {"step": 1}
    for _ in range(7):
        inner = {f"way{number}": inner for number in range(50)}
    return {"state_dict": state, "ways": inner}


def listing(state: State) -> dict[str, Any]:
    around: list[Any] = []
    around += [around] * 50
    return {"model": state, "around": around}


@pytest.mark.parametrize("change", [itself, shared, listing])
def test_pickles_that_hold_themselves(root: Path, change: Callable[[State], Any]) -> None:
    state = plain(root)
    pickled(root, change(state))
    assert torch.equal(head(root), state["head.weight"].float())


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


@pytest.mark.parametrize("name", ["x" * 5000, "..", "a\0b", "モ" * 200])
def test_shards_of_impossible_names(root: Path, name: str) -> None:
    shard(root, "llm", lambda shards, places: places.update({"head.bias": name}))
    refused(root, f"{WEIGHTS}.index.json: names the shard '", "which is not in")


@pytest.mark.parametrize(
    "averaged",
    [
        lambda s: {"shadow_params": list(s.values()), "decay": 0.999},
        lambda s: {key.replace(".", ""): value for key, value in s.items()},
        lambda s: {key: value for key, value in s.items() if "proj" in key},
    ],
)
def test_averaged_weights_that_are_not_read_are_told_of(
    root: Path, averaged: Callable[[State], Any], caplog: pytest.LogCaptureFixture
) -> None:
    state = plain(root)
    pickled(root, {"model": state, "ema": averaged(state)})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(head(root), state["head.weight"].float())
    assert "ema" in caplog.text
    assert "averaged weights in a form that is not read" in caplog.text
    caplog.clear()
    head(root, ema=False)  # asked for
    assert not caplog.records
