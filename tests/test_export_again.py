"""Exporting what is there already: the same is kept, anything else is refused by what differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from hart_runtime.common.checkpoint import SAMPLING_FILE
from hart_runtime.export import system_prompt
from hart_runtime.export.cli import main as export
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.manifest import read_manifest
from tests.golden_runs import HERE


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The demo's, to change; files are links until they are."""
    return Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint"))


def again(bundle: Path, *arguments: object) -> Result:
    given = ["--output", bundle, "--backend", "onnxruntime", *arguments]
    return CliRunner().invoke(export, [str(argument) for argument in given])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir() if f.is_file()}


def test_the_same_is_kept_and_said(bundle: Path, checkpoint: Path) -> None:
    before = contents(bundle)
    for arguments in ([], ["--precision", "fp16"], [checkpoint], [checkpoint / "llm", "--max-batch", 8]):
        done = again(bundle, *arguments)
        assert done.exit_code == 0, done.output
        assert f"{bundle}: is there already, from the same checkpoint with the same options" in done.output
    assert contents(bundle) == before
    moved = bundle.rename(bundle.with_name("by another name"))
    assert again(moved).exit_code == 0


def test_it_is_said_without_torch(bundle: Path) -> None:
    script = (
        "import sys\n"
        "from hart_runtime.export.cli import main\n"
        f"main(['--output', {str(bundle)!r}, '--backend', 'onnxruntime'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "is there already" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "precision": (lambda _: None, ["--precision", "int8"], "precision fp16, asked for int8"),
    "batch": (lambda _: None, ["--max-batch", "4"], "max_batch 8, asked for 4"),
    "sampling": (lambda c: change_json(c / SAMPLING_FILE, guidance=2.0), [], "other sampling defaults"),
    "weights": (lambda c: (c / "llm" / "ema_model.bin").write_bytes(b"x"), [], "other weights"),
    "configuration": (
        lambda c: change_json(c / "llm" / "config.json", cond_drop_rate=0.2),
        [],
        "another llm configuration",
    ),
    "tokenizer": (
        lambda c: (c / "text_encoder" / "tokenizer.json").write_text(
            (c / "text_encoder" / "tokenizer.json").read_text().replace('"Lowercase"', '"NFD"')
        ),
        [],
        "another text tokenizer",
    ),
    "no text encoder": (
        lambda c: shutil.rmtree(c / "text_encoder"),
        [],
        "another text_encoder configuration",
    ),
    "system prompt": (
        lambda c: change_json(c / "text_encoder" / "config.json", use_llm_system_prompt=True),
        [],
        f"system prompt None, asked for {system_prompt.SHA256}",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_needs_force(bundle: Path, checkpoint: Path, name: str) -> None:
    """None of it is loaded, and nothing is fetched, to say so."""
    change, arguments, words = CHANGES[name]
    change(checkpoint)
    before = contents(bundle)
    done = again(bundle, checkpoint, *arguments)
    assert done.exit_code == 2, done.output
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {bundle}: exists already, and not as asked for (")
    assert words in error
    assert error.endswith("give --force to replace it, or another --output")
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("decoder.onnx", "x", "decoder.onnx: expected"),
        (MANIFEST, "{", "not a readable manifest"),
        (MANIFEST, '{"schema": 1}', "schema 1 is older"),
    ],
)
def test_a_bundle_that_cannot_be_opened_is_not_the_same(
    bundle: Path, name: str, text: str, words: str
) -> None:
    (bundle / name).write_text(text)
    done = again(bundle)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "--force" in done.stderr


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for arguments in ([], ["--force"]):
        done = again(mine, *arguments)
        assert done.exit_code == 2
        assert "not a bundle" in done.stderr
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_force_makes_it_anew(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_text("x")
    done = again(bundle, "--force")
    assert done.exit_code == 0, done.output
    assert again(bundle).exit_code == 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("exporting ")]
    assert len(lines) > 10  # a line a graph where there is no terminal
    assert lines[0].endswith("(1 of 14)")


def test_which_set_of_a_file_went_in_is_said_and_kept(tmp_path: Path) -> None:
    root = Path(shutil.copytree(HERE / "t2i_main", tmp_path / "two sets"))
    state = load_file(root / "llm" / "model.safetensors")
    for name in ("model.safetensors", "ema_model.bin"):
        (root / "llm" / name).unlink()
    torch.save({"model": state, "ema": state}, root / "llm" / "pytorch_model.bin")
    done = again(tmp_path / "bundle", root)
    assert done.exit_code == 0, done.output
    assert (
        "weights: llm/pytorch_model.bin below 'ema' (averaged) (not what is below 'model'), " in done.output
    )
    manifest = read_manifest(tmp_path / "bundle")[0]
    assert (manifest.sets, manifest.averaged) == (["ema", "model"], True)
    for arguments in ([], ["--ema"]):
        assert "is there already" in again(tmp_path / "bundle", root, *arguments).output
    done = again(tmp_path / "bundle", root, "--no-ema")
    assert done.exit_code == 2
    assert "not as asked for (weights below 'ema', asked for those below 'model')" in done.stderr


def test_averaged_weights_are_asked_of_a_bundle_without(bundle: Path) -> None:
    done = again(bundle, "--ema")
    assert done.exit_code == 2
    assert "--ema: expected averaged weights" in done.stderr


def test_a_missing_text_encoder_is_told_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder")
    (checkpoint / "llm" / "model.safetensors").write_bytes(b"x")
    done = again(tmp_path / "new", checkpoint)
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "note: there is no text encoder, so this bundle will draw from text features"
    )
    assert "model.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("tokenizer", "the tokenizer's; give the folder above it"),
        ("text_encoder", "another model's"),
        ("llm/model.safetensors", "is a file; give the folder of the checkpoint"),
    ],
)
def test_a_part_of_a_checkpoint_is_recognized(tmp_path: Path, place: str, words: str) -> None:
    done = again(tmp_path / "new", DEMO_CHECKPOINT / place)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_dry_run_tells_of_what_is_there(bundle: Path, tmp_path: Path) -> None:
    def dry(*arguments: object) -> str:
        done = again(bundle, "--dry-run", *arguments)
        assert done.exit_code == 0, done.output
        return done.output

    assert "is there already, from the same checkpoint with the same options" in dry()
    assert "would be refused: " in dry("--precision", "int8")
    assert "give --force to replace it" in dry("--max-batch", 2)
    assert "would be refused" not in dry("--max-batch", 2, "--force")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        assert "would be refused: " in dry("--output", place)
    refused = again(bundle, "--dry-run", "--system-prompt", tmp_path / "none.txt")
    assert refused.exit_code == 2
    assert "none.txt" in refused.stderr


@pytest.mark.parametrize("made", ["file", "below a file", "dangling"])
def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path, made: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    place = tmp_path / "file" / "x" if made == "below a file" else tmp_path / made
    done = again(place, "--force")
    assert done.exit_code == 2
    assert "exporting" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_is_no_checkpoint(bundle: Path, tmp_path: Path) -> None:
    done = again(tmp_path / "x", bundle)
    assert done.exit_code == 2
    assert f"{bundle}: is a bundle, expected the checkpoint" in done.stderr
    done = again(tmp_path / "x", DEMO_CHECKPOINT, "--text-encoder", tmp_path / "nope")
    assert done.exit_code == 2
    assert "nope" in done.stderr
