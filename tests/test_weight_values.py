"""Weights of other types, values that cannot be, and tables of another configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hart_runtime.common.errors import InputError
from tests.checkpoint_copies import (
    BIAS,
    PARTS,
    PROJ,
    TEXT_WEIGHT,
    WEIGHTS,
    State,
    dry,
    edit,
    head,
    load,
    pickled,
    plain,
    refused,
)


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
