"""Which tensors of weight files are the network's: wrapped, nested, averaged, several sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.weight_files import is_averaged
from hart_runtime.hart.checkpoints import stored_sets
from tests.checkpoint_copies import (
    BIAS,
    State,
    dry,
    edit,
    head,
    load,
    pickled,
    plain,
    refused,
)


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
        (
            lambda s: {"ema": s, "averaged": s, "x": s},
            ("several sets of weights", "'ema' and 'averaged'"),
        ),
        (lambda s: {**below(s, "model."), **below(s, "net.")}, ("several sets of weights",)),
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
        assert find_checkpoint(root, ema=ema).llm.weights.averaged
    found = find_checkpoint(root, ema=False)
    assert torch.equal(head(root, ema=False), state["head.weight"].float())
    assert not found.llm.weights.averaged
    assert found.llm.weights.passed_over


TWO: dict[str, Callable[[State, State], Any]] = {
    "keys": lambda plain, averaged: {"model": plain, "ema": averaged, "step": 5},
    "deep": lambda plain, averaged: {"state": {"net": below(plain, "module.")}, "model_ema": {"x": averaged}},
    "prefixes": lambda plain, averaged: {**below(plain, "online_model."), **below(averaged, "ema_model.")},
    "beside": lambda plain, averaged: {**plain, **below(averaged, "averaged.")},
    "opposite": lambda plain, averaged: {"non_ema": plain, "ema": averaged},
}


@pytest.mark.parametrize("name", TWO)
def test_averaged_weights_beside_others_in_one_file(root: Path, name: str) -> None:
    state = plain(root)
    averaged = {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}
    pickled(root, TWO[name](state, averaged))
    for ema, expected in ((None, averaged), (True, averaged), (False, state)):
        assert torch.equal(head(root, ema), expected["head.weight"].float())
        chosen, other = stored_sets(find_checkpoint(root, ema=ema))
        assert (is_averaged(chosen), is_averaged(other)) == (ema is not False, ema is False)


@pytest.mark.parametrize("key", ["ema", "model_ema", "averaged"])
def test_averaged_weights_alone(root: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    state = plain(root)
    pickled(root, {key: state})
    for ema in (None, True):
        assert torch.equal(head(root, ema), state["head.weight"].float())
    assert caplog.records == []
    head(root, ema=False)
    assert "holds averaged weights and no others, they are used" in caplog.text


@pytest.mark.parametrize("name", ["model_non_ema.bin", "schema.bin", None])
@pytest.mark.parametrize("key", [None, "model", "non_ema"])
def test_averaged_weights_that_are_not_there(root: Path, name: str | None, key: str | None) -> None:
    state = plain(root)
    if name:
        torch.save(state, root / "llm" / name)
    if key:
        pickled(root, {key: state})
    head(root)
    with pytest.raises(InputError, match="`ema`: expected averaged weights, in a file such as"):
        head(root, ema=True)


@pytest.mark.parametrize(
    "averaged",
    [
        lambda s: {"ema": {"shadow_params": list(s.values()), "decay": 0.999}},
        lambda s: {"ema": {key.replace(".", ""): value for key, value in s.items()}},
        lambda s: {"ema": {key: value for key, value in s.items() if "proj" in key}},
        lambda s: {"ema_flat": torch.cat([value.flatten().float() for value in s.values()])},
        lambda s: {"shadow": {"params": list(s.values()), "decay": 0.999}},
        lambda s: {"callbacks": {"average": {str(n): value for n, value in enumerate(s.values())}}},
    ],
)
def test_averaged_weights_that_are_not_read_are_told_of(
    root: Path, averaged: Callable[[State], Any], caplog: pytest.LogCaptureFixture
) -> None:
    state = plain(root)
    optimizer = {"state": {n: {"exp_avg": value} for n, value in enumerate(state.values())}}
    pickled(root, {"model": state, "optimizer": optimizer, **averaged(state)})
    assert torch.equal(head(root), state["head.weight"].float())
    assert str(root / "llm" / "pytorch_model.bin") in caplog.text
    assert "averaged weights in a form that is not read" in caplog.text
    caplog.clear()
    head(root, ema=False)  # asked for
    assert not caplog.records
