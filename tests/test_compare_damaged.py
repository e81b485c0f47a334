"""References that are damaged, of another bundle or none at all: one sentence, before any graph runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.compare.cli import main
from hart_runtime.compare.place import PAGE, REPORT, check_place
from hart_runtime.compare.record import Source, capture_prompts
from hart_runtime.compare.reference import (
    DESCRIPTION,
    RUNNER,
    SCHEMA_VERSION,
    TRAJECTORY,
    check_reference_place,
    load_reference,
    save_reference,
)
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.bundle import describe_files, open_bundle

Change = Callable[[Any], object]
PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def saved(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle, folder = open_bundle(demo_bundle), tmp_path_factory.mktemp("saved") / "reference"
    source = Source.of(find_checkpoint(DEMO_CHECKPOINT), bundle.manifest)
    save_reference(capture_prompts(source, bundle, PROMPTS, "cpu", 1), bundle.manifest, folder)
    assert len(load_reference(folder, bundle.manifest).batches) == 2
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "reference"))


def refused(bundle: Path, reference: Path, words: str) -> None:
    output = reference.parent / "report"
    given = ["--engine", bundle, "--reference", reference, "--output", output, "--device", "cpu"]
    done = CliRunner().invoke(main, [str(a) for a in given])
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 700
    assert done.stdout == ""
    assert not output.exists()


def put(*path: str | int, value: Any) -> Change:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


DESCRIPTIONS: dict[str, tuple[Change, str]] = {
    "prompts that are numbers": (put("prompts", value=[1, 2]), "prompts[0]: expected text, found 1"),
    "prompts that are text": (put("prompts", value="a red circle"), "prompts: expected a list"),
    "a prompt too few": (put("prompts", value=["a red circle"]), "a picture for each of 1 prompts, found 2"),
    "half of a character": (put("prompts", 0, value="\ud800"), "expected text, found half"),
    "weights in a list": (put("weights", value=[]), "weights: expected an object"),
    "a hash that is null": (put("weights", "llm", value={"x": None}), "weights.llm.x: expected text"),
    "weights of another": (put("weights", "llm", value={"x": "0" * 64}), "was exported from"),
    "no weights": (put("weights", value={}), "its llm weights are none"),
    "another system prompt": (put("weights", "system_prompt", value={"text": "0"}), "another system prompt"),
    "other scales": (put("patch_nums", value=[1, 2, 3, 4, 8]), "was recorded with scales [1, 2, 3, 4, 8]"),
    "scales that are text": (put("patch_nums", value="12358"), "patch_nums: expected a list"),
    "settings of nobody": (put("settings", "colour", value=1), "colour"),
    "settings of another type": (put("settings", "top_k", value="many"), "top_k"),
    "settings out of range": (put("settings", "top_k", value=10**6), "top_k: expected 1 to 512"),
    "no settings": (lambda v: v.pop("settings"), "settings is missing"),
    "errors that are text": (put("half_errors", value={"x": "0.1"}), "half_errors"),
    "errors that are NaN": (put("half_errors", value={"x": float("nan")}), "NaN is no number of JSON"),
    "settings that are infinite": (put("settings", "guidance", value=float("inf")), "Infinity is no number"),
    "a machine that is a list": (put("made_with", value=["cpu"]), "made_with: expected an object"),
    "a field of nobody": (put("colour", value=1), "unknown colour"),
    "a newer schema": (put("schema", value=99), f"expected schema {SCHEMA_VERSION}, found 99"),
    "no seal": (lambda v: v.pop("trajectory"), "trajectory is missing"),
    "the seal of another": (put("trajectory", "sha256", value=["0" * 64]), "is truncated or was changed"),
    "a seal without a hash": (put("trajectory", "sha256", value=[]), "is truncated or was changed"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_contradict(demo_bundle: Path, copy: Path, name: str) -> None:
    change, words = DESCRIPTIONS[name]
    values = json.loads((copy / DESCRIPTION).read_text())
    change(values)
    (copy / DESCRIPTION).write_text(json.dumps(values))
    refused(demo_bundle, copy, words)


@pytest.mark.parametrize(
    "change",
    [
        put("prompts", 0, value="a red circle " * 100),
        put("prompts", 0, value="円" * 5000),
        put("made_with", "checkpoint", value="/" + "a/" * 1000),
    ],
)
def test_what_a_user_writes_may_be_long(demo_bundle: Path, copy: Path, change: Change) -> None:
    values = json.loads((copy / DESCRIPTION).read_text())
    change(values)
    (copy / DESCRIPTION).write_text(json.dumps(values))
    assert len(load_reference(copy, open_bundle(demo_bundle).manifest).batches) == 2


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def of_nobody(file: Path) -> None:
    file.write_text("[1, 2, 3]")


def paged(file: Path) -> None:
    file.write_text("<!doctype html><p>not found")


def one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def silent(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def in_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILES = [halved, emptied, of_nobody, paged, silent, endless, in_a_folder, Path.unlink]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows, and it has no FIFO")
@pytest.mark.parametrize("change", [*FILES, one_bit])
@pytest.mark.parametrize("file", [DESCRIPTION, TRAJECTORY])
def test_files_that_are_damaged(
    demo_bundle: Path, copy: Path, file: str, change: Callable[[Path], object]
) -> None:
    change(copy / file)
    refused(demo_bundle, copy, f"{file}: " if change is not one_bit else "")


def without(*names: str) -> Change:
    return lambda batches: [batches[0].pop(name) for name in names]


def changed(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda batches: batches[0].update({name: make(batches[0][name])})


TENSORS: dict[str, tuple[Change, str]] = {
    "no pictures": (lambda batches: batches.clear(), "expected recorded pictures, found none"),
    "a batch without tensors": (lambda batches: batches[0].clear(), "ctx.features: expected 3 axes"),
    "no mask": (without("ctx.mask"), "ctx.mask: expected 2 axes, the first of 1, found ()"),
    "no picture": (without("image"), "ctx.features: expected 3 axes, the first of 0"),
    "no random numbers": (without("scale0.u"), "scale0.u: expected"),
    "none of a step": (without("final.diff.step3.noise"), "final.diff.step3.noise: expected"),
    "no keys": (without("kv.block2.k"), "lacks kv.block2.k"),
    "no prediction": (without("final.diff.step2.model_out"), "final.diff.step2.model_out: expected"),
    "names": (changed("scale1.idx", lambda a: a.astype(str)), "scale1.idx"),
    "objects": (changed("scale1.idx", lambda a: "circle"), "scale1.idx"),
    "complex numbers": (changed("ctx.features", lambda a: a.astype(np.complex64)), "expected numbers"),
    "codes in float": (
        changed("scale1.idx", lambda a: a.astype(np.float32)),
        "scale1.idx: expected index int64",
    ),
    "a mask of numbers": (changed("ctx.mask", lambda a: a.astype(np.int64)), "ctx.mask: expected mask bool"),
    "a token too few": (changed("ctx.features", lambda a: a[:, :-1]), "ctx.features: expected features"),
    "a picture too many": (
        changed("image", lambda a: np.concatenate([a, a])),
        "the first of 2, found (1, 16, 128)",
    ),
    "a smaller picture": (changed("image", lambda a: a[:, :, ::2]), "image: expected"),
    "a shape of nothing": (changed("scale2.hidden", lambda a: a[:0]), "scale2.hidden: expected"),
    "token ids beyond the table": (changed("input_ids", lambda a: a + 339), "a table of 339, found up to"),
    "token ids below it": (changed("input_ids", lambda a: a - 400), "input_ids: expected rows of a table"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_recordings_that_are_none_of_the_bundle(demo_bundle: Path, copy: Path, name: str) -> None:
    """Sealed, as by somebody who edits references."""
    from polygraphy.comparator import RunResults

    change, words = TENSORS[name]
    batches = load_reference(copy, open_bundle(demo_bundle).manifest).batches
    change(batches)
    results = RunResults()
    results.add(batches, runner_name=RUNNER)
    results.save(str(copy / TRAJECTORY))
    values = json.loads((copy / DESCRIPTION).read_text())
    values["trajectory"] = asdict(describe_files(copy, [TRAJECTORY])[TRAJECTORY])
    (copy / DESCRIPTION).write_text(json.dumps(values))
    refused(demo_bundle, copy, words)


@pytest.mark.parametrize("change", [*FILES])
def test_only_a_reference_is_replaced(copy: Path, change: Callable[[Path], object]) -> None:
    from hart_runtime.common.errors import InputError

    change(copy / DESCRIPTION)
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        check_reference_place(copy)


@pytest.mark.parametrize("kind", ["a report of others", "a page of others", "a link to nothing", "a folder"])
def test_no_file_of_the_users_makes_room_for_a_report(
    demo_bundle: Path, copy: Path, tmp_path: Path, kind: str
) -> None:
    """It is found before anything is compared; an earlier report of ours is told of and replaced."""
    output = tmp_path / "out"
    output.mkdir()
    file = output / (PAGE if "page" in kind else REPORT)
    if kind == "a folder":
        file.mkdir()
    elif kind == "a link to nothing":
        file.symlink_to(tmp_path / "nothing")
    else:
        file.write_text('{"passed": "my own"}')
    given = ["--engine", demo_bundle, "--reference", copy, "--output", output, "--device", "cpu"]
    done = CliRunner().invoke(main, [str(a) for a in given])
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"error: {file}: is no report of hart-compare, and is not replaced; give another --output\n"
    )
    assert [path.name for path in output.iterdir()] == [file.name]


def test_an_earlier_report_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_place(tmp_path)
    assert caplog.records == []
    (tmp_path / REPORT).write_text('{"schema": 1, "passed": true, "runs": []}')
    check_place(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: an earlier report, replaced when this one is done"
    ]
