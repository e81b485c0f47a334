"""The two files of a VAR checkpoint as people have them: what is wrong is said by file and tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_runtime.common.errors import InputError
from hart_runtime.hart.var_checkpoint import load_var
from tests.golden_runs import HERE

State = dict[str, Tensor]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3310000000\n"
VAR, VAE = "var.pth", "vae.pth"
PROJ, CONV, CODES = "blocks.0.attn.proj.weight", "decoder.conv_out.weight", "quantize.embedding.weight"
LEVELS, HEADS = "lvl_1L", "blocks.0.attn.scale_mul_1H11"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Links to both files; what is changed is written in their place."""
    for name in (VAR, VAE):
        (tmp_path / name).symlink_to(HERE / "var_plain" / name)
    return tmp_path


def state_of(name: str) -> State:
    return torch.load(HERE / "var_plain" / name, weights_only=True)


def put(file: Path, content: Any) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)


def refused(root: Path, name: str, words: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(InputError) as caught:
        load_var(root / VAR, root / VAE, dtype)
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"{root / name}: ")
    assert said.count(str(root / name)) == 1 + words.startswith("is stored twice")
    assert said.isprintable()
    assert len(said) < 500


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


FINITE, HALF, KIND = (
    "holds NaN or infinity, 1 of",
    "beyond the 65504 of float16",
    "expected float64, float32,",
)
NUMBERS, SQUARES, SIZES = (
    "lvl_1L: expected numbers, found",
    "expected square numbers",
    "dimensions above 0, found",
)


@pytest.mark.parametrize(
    ("name", "key", "change", "words"),
    [
        (VAR, PROJ, first(float("nan")), FINITE),
        (VAR, "class_emb.weight", first(float("inf")), FINITE),
        (VAE, CONV, first(-float("inf")), FINITE),
        (VAR, PROJ, first(7e4), HALF),
        (VAR, "head.bias", first(-1e9), HALF),
        (VAE, CONV, first(65520.0), HALF),
        (VAR, PROJ, lambda t: t.to(torch.int8), KIND),
        (VAR, PROJ, lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), KIND),
        (VAE, CODES, lambda t: t.to_sparse(), KIND),
        (VAE, CONV, lambda t: t.to("meta"), KIND),
        (VAR, LEVELS, lambda t: t.to("meta"), NUMBERS),
        (VAR, LEVELS, lambda t: t.to_sparse(), NUMBERS),
        (VAR, LEVELS, lambda t: t.bool(), NUMBERS),
        (VAR, LEVELS, lambda t: t * float("nan"), SQUARES),
        (VAR, LEVELS, lambda t: t.flip(1), SQUARES),
        (VAR, LEVELS, lambda t: t[:, :0], "at least two scales"),
        (VAR, HEADS, lambda t: t.flatten(), f"{HEADS}: expected 4 {SIZES}"),
        (VAR, "class_emb.weight", lambda t: t[:0], f"class_emb.weight: expected 2 {SIZES}"),
        (VAE, "encoder.conv_in.weight", lambda t: t[:0], f"encoder.conv_in.weight: expected 4 {SIZES}"),
        (VAR, "attn_bias_for_masking", lambda t: t[..., :5], "but the other tensors are for 66 tokens"),
        (VAE, "quantize.ema_vocab_hit_SV", lambda t: t[:, :7], "but the other tensors are for 1024 codes"),
        (VAE, "quantize.ema_vocab_hit_SV", lambda t: t.flatten(), "but the other tensors are for 1024 codes"),
    ],
)
def test_tensors_that_cannot_be(
    root: Path, name: str, key: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    state = state_of(name)
    put(root / name, {**state, key: change(state[key].clone())})
    refused(root, name, words, torch.float16 if words == HALF else torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (VAR, lambda s: {**s, "module.head.weight": s["head.weight"]}, "is stored twice, also as"),
        (VAE, lambda s: {**s, f"_orig_mod.{CODES}": s[CODES]}, "is stored twice, also as"),
        (VAE, lambda s: {**s, f"module.{CONV}": s[CONV]}, "is stored twice, also as"),
        (VAR, lambda s: {"model": s, "ema": s}, "has one pos_1LC, found 2, below 'ema' and 'model'"),
        (VAR, lambda s: {"state": s, "last": {"net": s}}, "found 2, below 'last.net' and 'state'"),
        (VAR, lambda s: {**s, "blocks.1000000000.x": s[LEVELS]}, "unexpected: blocks.1000000000.x"),
        (VAR, lambda s: {**s, f"blocks.{'9' * 5000}.x": s[LEVELS]}, "unexpected: 'blocks.999"),
        (
            VAE,
            lambda s: {**s, "encoder.down.77777777.x": s[CODES]},
            f"encoder.down.2.block.0.conv1.weight: expected 4 {SIZES}",
        ),
    ],
)
def test_names_that_cannot_be(root: Path, name: str, change: Callable[[State], Any], words: str) -> None:
    put(root / name, change(state_of(name)))
    refused(root, name, words)


@pytest.mark.parametrize("name", [VAR, VAE])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: POINTER.encode(), "run: git lfs pull"),
        (lambda _: b"<!DOCTYPE html>", "is a web page"),
        (lambda _: b"", "is empty"),
        (lambda raw: raw[: len(raw) // 2], "is cut off, at least "),
        (lambda raw: raw[:-10], "is cut off, its end is missing"),
        (
            lambda raw: raw[: len(raw) // 2] + bytes(512) + raw[len(raw) // 2 + 512 :],
            "is not as it was written",
        ),
    ],
)
def test_files_that_are_something_else(
    root: Path, name: str, change: Callable[[bytes], bytes], words: str
) -> None:
    put(root / name, change((root / name).read_bytes()))
    refused(root, name, words)


@pytest.mark.parametrize("name", [VAR, VAE])
def test_files_that_are_none(root: Path, name: str) -> None:
    (root / name).unlink()
    refused(root, name, "no such file")
    (root / name).mkdir()
    refused(root, name, "is no regular file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor such devices")
@pytest.mark.parametrize("name", [VAR, VAE])
@pytest.mark.parametrize("thing", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_files_that_have_no_end(root: Path, name: str, thing: Callable[[Path], None]) -> None:
    (root / name).unlink()
    thing(root / name)
    refused(root, name, "is no regular file")


@pytest.mark.parametrize("name", [VAR, VAE])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"model.{key}": value for key, value in s.items()}, "epoch": 3},
        lambda s: {"trainer": {"var_wo_ddp": s, "optimizer": {0: torch.ones(3)}}, "args": {"a": "b"}},
    ],
)
def test_wrapped_state_dicts(root: Path, name: str, wrapped: Callable[[State], Any]) -> None:
    state = state_of(name)
    put(root / name, wrapped(state))
    model = load_var(root / VAR, root / VAE)
    found = model.transformer if name == VAR else model.tokenizer
    key = "head.weight" if name == VAR else CONV
    assert torch.equal(found.get_parameter(key), state[key].float())
