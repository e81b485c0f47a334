"""Published layouts load; everything else is refused with a sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.hart.checkpoint import load_hart
from tests.golden_runs import HERE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a recorded checkpoint, EMA weights included."""
    root = tmp_path / "model"
    shutil.copytree(HERE / "t2i_main", root, ignore=shutil.ignore_patterns("golden"))
    return root


def head(root: Path) -> torch.Tensor:
    return load_hart(find_checkpoint(root)).transformer.head.weight


def test_ema_weights_come_first(checkpoint: Path) -> None:
    plain = load_file(checkpoint / "llm" / "model.safetensors")["head.weight"]
    averaged = torch.load(checkpoint / "llm" / "ema_model.bin", weights_only=True)["head.weight"]
    assert torch.equal(head(checkpoint), averaged)
    (checkpoint / "llm" / "ema_model.bin").unlink()
    assert torch.equal(head(checkpoint), plain)
    assert not torch.equal(plain, averaged)


def test_the_llm_folder_itself_is_accepted(checkpoint: Path) -> None:
    assert torch.equal(head(checkpoint / "llm"), head(checkpoint))


def test_sharded_and_pickled_weights_are_the_same_model(checkpoint: Path) -> None:
    llm = checkpoint / "llm"
    (llm / "ema_model.bin").unlink()
    expected = head(checkpoint).clone()
    state = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    keys = sorted(state)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, llm / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(head(checkpoint), expected)
    for name in (*shards, "model.safetensors.index.json"):
        (llm / name).unlink()
    torch.save(state, llm / "pytorch_model.bin")
    assert torch.equal(head(checkpoint), expected)


def edit(change: Callable[[dict[str, torch.Tensor]], object], root: Path) -> None:
    (root / "llm" / "ema_model.bin").unlink()
    file = root / "llm" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("head.bias"), "missing: head.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), r"shape: head.bias \[3\] instead of \[1024\]"),
    ],
)
def test_wrong_keys_are_listed(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], expected: str
) -> None:
    edit(change, checkpoint)
    with pytest.raises(InputError, match=expected):
        load_hart(find_checkpoint(checkpoint))


class Attack:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1/0",))


def test_a_pickle_with_code_is_never_run(checkpoint: Path) -> None:
    (checkpoint / "llm" / "ema_model.bin").unlink()
    (checkpoint / "llm" / "model.safetensors").unlink()
    torch.save({"head.weight": Attack()}, checkpoint / "llm" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        load_hart(find_checkpoint(checkpoint))
    (checkpoint / "llm" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        load_hart(find_checkpoint(checkpoint))


@pytest.mark.parametrize("name", ["llm/ema_model.bin", "tokenizer/model.safetensors"])
def test_a_truncated_weight_file_is_named(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=file.name):
        load_hart(find_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        ("llm", "attn_type", "gpt2", "attn_type must be 'llama'"),
        ("llm", "use_cross_attn", True, "use_cross_attn"),
        ("llm", "sampler", "ddim", "sampler must be 'iddpm'"),
        ("llm", "context_token", 1, "context_token: expected 2 to"),
        ("llm", "num_heads", 5, "embed_dim / num_heads"),
        ("llm", "patch_nums", [1], "at least two scales"),
        ("tokenizer", "quantizer_type", "var", "quantizer_type must be 'var_hybrid'"),
        ("tokenizer", "ch", 30, "multiple of 32"),
    ],
)
def test_options_the_published_code_cannot_run(
    checkpoint: Path, file: str, key: str, value: object, expected: str
) -> None:
    path = checkpoint / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=expected) as error:
        load_hart(find_checkpoint(checkpoint))
    assert str(path) in str(error.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_hart(find_checkpoint(tmp_path / "nothing"))
    with pytest.raises(InputError, match="not a HART checkpoint"):
        load_hart(find_checkpoint(tmp_path))


def test_double_decoder_keys_are_ignored(checkpoint: Path) -> None:
    folder = checkpoint / "tokenizer"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "double_decoder": True}))
    state = load_file(folder / "model.safetensors")
    second = {
        key.replace("vae.decoder.", "vae.decoder2.", 1): value.clone()
        for key, value in state.items()
        if key.startswith("vae.decoder.")
    }
    save_file({**state, **second}, folder / "model.safetensors")
    load_hart(find_checkpoint(checkpoint))
