"""Copies of recorded checkpoints, to be changed as people have them."""

from __future__ import annotations

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
from hart_runtime.hart.checkpoint import check_hart, check_text_encoder, load_hart, load_text_encoder
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from tests.golden_runs import HERE

State = dict[str, Tensor]
WEIGHTS = "model.safetensors"
PROJ, BIAS, CODES = "blocks.0.attn.proj.weight", "head.bias", "vae.quantize.embedding.weight"
TEXT_WEIGHT = "layers.0.self_attn.q_proj.weight"
PARTS = [("llm", PROJ), ("llm", BIAS), ("tokenizer", CODES), ("text_encoder", TEXT_WEIGHT)]


def recorded(tmp_path: Path) -> Path:
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
