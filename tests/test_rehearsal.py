"""The rehearsal of the published model: on a tiny shape here, whole with ``pytest -m slow``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from hart_runtime.common.errors import RunError
from hart_runtime.compare import rehearsal
from hart_runtime.compare.rehearsal import CAPTURED, LARGEST, SHAPE, main, rehearse, steps
from tests.test_random_checkpoint import SHAPE as TINY
from tests.var_models import SMALL

QUICK = ("checkpoint", "export fp32", "open fp32", "draw fp32", "large scales: compare")
"""Steps without what other tests do too: more exports, hart-compare, engines."""


def quick_steps(shape: str) -> list[rehearsal.Step]:
    return [step for step in steps(shape, "small", 2) if step.name in QUICK]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A rehearsal of a tiny shape and what it said."""
    folder = tmp_path_factory.mktemp("rehearsal")
    shape = folder / "tiny.json"
    shape.write_text(json.dumps(TINY))
    said: list[str] = []
    fine = rehearse(folder, quick_steps(str(shape)), said.append)
    assert not fine  # a process is many times as large as the weights of a tiny model
    return folder, said


def test_every_step_says_what_it_took(rehearsed: tuple[Path, list[str]]) -> None:
    _, said = rehearsed
    for name in QUICK:
        assert any(line.startswith(f"{name}: ") and "GB at the most" in line for line in said)
    answers = [line.strip() for line in said if "asked for" in line]
    assert len(answers) == 2
    assert answers[0].endswith("times the weights, asked for at most 1.6: NO")
    assert answers[1].endswith("GB, asked for at most 3 more: yes")


def test_the_large_scales_are_compared(rehearsed: tuple[Path, list[str]]) -> None:
    folder, said = rehearsed
    graphs = {file.stem.split("-")[1] for file in (folder / CAPTURED).glob("[0-9]*.npz")}
    assert graphs == {
        *("transformer", "sample", "smooth", "residual_condition", "residual_step", "latent", "decoder"),
    }
    for graph in graphs:
        lines = [line for line in said if re.match(rf"\s*scale 2 {graph}: .*tolerance", line)]
        assert lines
        assert all(line.endswith(": within tolerance") for line in lines)
    assert (folder / CAPTURED / "picture.png").is_file()


def test_done_steps_are_not_done_again(rehearsed: tuple[Path, list[str]]) -> None:
    folder, _ = rehearsed
    said: list[str] = []
    todo = [step for step in quick_steps("nothing") if step.makes]
    assert rehearse(folder, todo, said.append)
    assert all("there already" in line for line in said)


def change(array: NDArray[Any]) -> NDArray[Any]:
    changed = array.copy()
    changed.flat[0] += 0.01 * np.abs(array).max()
    return changed


def change_hidden(folder: Path) -> None:
    file = next((folder / CAPTURED).glob("*-transformer-*.npz"))
    with np.load(file) as opened:
        arrays: dict[str, Any] = {name: opened[name] for name in opened.files}
    np.savez(file, **{**arrays, "out.hidden": change(arrays["out.hidden"])})


def change_last_key(folder: Path) -> None:
    file = folder / CAPTURED / "cache" / "key_0.npy"
    array = np.load(file)
    array[-1] += 0.01 * np.abs(array).max()
    np.save(file, array)


@pytest.mark.parametrize("damage", [change_hidden, change_last_key])
def test_a_difference_is_found(
    rehearsed: tuple[Path, list[str]], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, _ = rehearsed
    for name in ("checkpoint", "fp32"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / CAPTURED / "cache").mkdir(parents=True)
    for file in [*(folder / CAPTURED).glob("[0-9]*.npz"), *(folder / CAPTURED / "cache").iterdir()]:
        (tmp_path / file.relative_to(folder)).write_bytes(file.read_bytes())
    damage(tmp_path)
    only = [step for step in steps("", "small", 2) if step.name == "large scales: compare"]
    with pytest.raises(RunError, match="ended with 1"):
        rehearse(tmp_path, only, lambda _: None)
    log = (tmp_path / "large-scales-compare.log").read_text()
    wrong = [line for line in log.splitlines() if "NOT within" in line]
    assert wrong
    assert wrong[0].startswith("scale 2 transformer")


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A text encoder that does not fit is refused by the step; a shape that there is not, before."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    given = ["--folder", str(tmp_path / "x"), "--only", "checkpoint", "--shape"]
    done = CliRunner().invoke(main, [*given, str(tmp_path / "tiny.json"), "--text-encoder", "qwen2-1.5b"])
    assert done.exit_code == 1
    assert "ended with 2: error: --text-encoder qwen2-1.5b: its features are 1536 wide" in done.stderr
    assert not (tmp_path / "x" / "checkpoint").exists()
    for refused in (["nothing"], [str(tmp_path / "tiny.json"), "--text-encoder", "big"]):
        done = CliRunner().invoke(
            main, ["--folder", str(tmp_path / "y"), "--only", "checkpoint", "--shape", *refused]
        )
        assert done.exit_code == 2
        assert refused[-1] in done.stderr
    assert not (tmp_path / "y").exists()


def test_a_shape_of_var(tmp_path: Path) -> None:
    """Its own steps, on a tiny shape; other tests have the exports, hart-compare and engines."""
    shape = tmp_path / "tiny.json"
    transformer, tokenizer = asdict(SMALL.transformer), asdict(SMALL.tokenizer)
    sizes = {name: tokenizer[name] for name in ("vocab_size", "z_channels", "ch", "ch_mult")}
    shape.write_text(json.dumps({"transformer": transformer, "tokenizer": sizes}))
    only = [word for step in ("checkpoint", "export fp32", "draw fp32") for word in ("--only", step)]
    done = CliRunner().invoke(main, ["--folder", str(tmp_path / "x"), "--shape", str(shape), *only])
    assert done.exit_code == 1, done.output  # a process is many times as large as the weights of a tiny model
    assert "times the weights, asked for at most 1.6: NO" in done.output
    assert "GB, asked for at most 3 more: yes" in done.output
    assert (tmp_path / "x" / CAPTURED / "picture.png").is_file()
    done = CliRunner().invoke(main, ["--folder", str(tmp_path), "--shape", str(shape), "--only", "open fp16"])
    assert (done.exit_code, "expected one of checkpoint, export fp32" in done.stderr) == (2, True)


@pytest.mark.slow
def test_the_full_shape(tmp_path: Path) -> None:
    """Takes an hour on two cores, 24 GB of memory and 40 GB of disk.

    HART_REHEARSAL names a folder to keep and to go on in.
    """
    folder = Path(os.environ.get("HART_REHEARSAL", tmp_path))
    assert rehearse(folder, steps(SHAPE, "qwen2-1.5b", LARGEST), print)
