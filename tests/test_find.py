"""Which bundle is meant: by a folder, a manifest, or a folder that holds bundles; in every command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hart_runtime import InputError, Pipeline
from hart_runtime.bench.cli import main as bench
from hart_runtime.compare.cli import main as compare
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.find import MANIFEST, WEIGHTS, find_bundle
from hart_runtime.runtime.tensorrt.cli import main as build

PROMPT = "a red circle on a white background"
COMMANDS = {
    "hart-run": (run, [PROMPT]),
    "hart-build": (build, []),
    "hart-compare": (compare, []),
    "hart-bench": (bench, []),
}


@pytest.fixture
def engines(demo_bundle: Path, tmp_path: Path) -> Path:
    """A folder as users have it: a README, a bundle, and something half written."""
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "README.md").write_text("where bundles go")
    (folder / "demo").symlink_to(demo_bundle)
    (folder / ".half").mkdir()
    (folder / ".half" / MANIFEST).write_text("{")
    return folder


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_only_bundle_is_used_and_named(engines: Path, tmp_path: Path) -> None:
    done = invoke(run, "--engine", f"{engines}/", PROMPT, "--output", tmp_path / "x.png")
    assert done.exit_code == 0, done.output
    assert f"using the bundle {engines / 'demo'}" in done.stderr
    quiet = invoke(run, "--engine", engines / "demo" / MANIFEST, PROMPT, "--output", tmp_path / "y.png")
    assert quiet.exit_code == 0, quiet.output
    assert "using" not in quiet.stderr
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_from_python_too(engines: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in (engines, str(engines), engines / "demo", engines / "demo" / MANIFEST):
        assert Pipeline.load(place, device="cpu").bundle.folder == engines / "demo"
    assert caplog.messages == [f"using the bundle {engines / 'demo'}"] * 2


def test_it_is_named_on_stderr_without_any_logging_set_up(engines: Path) -> None:
    script = f"from hart_runtime import Pipeline; Pipeline.load({str(engines)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == f"using the bundle {engines / 'demo'}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_of_several_one_has_to_be_chosen(engines: Path, demo_bundle: Path, name: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo_bundle, engines / "other"))
    values = json.loads((other / MANIFEST).read_text())
    del values["graphs"]["text_encoder"]
    (other / MANIFEST).write_text(json.dumps({**values, "precision": "int8", "name": "mine"}))
    (engines / "third").mkdir()
    (engines / "third" / MANIFEST).write_text("{")
    (engines / "third" / WEIGHTS).write_text("")
    (engines / "web page").mkdir()
    (engines / "web page" / MANIFEST).write_text('{"name": "not ours"}')
    command, more = COMMANDS[name]
    done = invoke(command, "--engine", engines, *more)
    assert done.exit_code == 2
    first, *lines = done.stderr.strip().splitlines()
    assert first == f"error: {engines}: holds 3 bundles, choose one:"
    assert len(lines) == 3
    described = (
        ".*: 64 x 64 pictures from prompts, fp16",
        "mine: 64 x 64 pictures from text features, int8",
        "third: its manifest cannot be read",
    )
    for line, words in zip(lines, described, strict=True):
        assert re.match(rf"  .*{words}, 20\d\d-\d\d-\d\d \d\d:\d\d: ", line), line
    for line, folder in zip(lines, ("demo", "other", "third"), strict=True):
        assert line.endswith(f": --engine {engines / folder}")
    assert list(tmp_path.iterdir()) == [engines]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("nothing", ("no such folder", "hart-export")),
        ("file", ("it is a file", MANIFEST)),
        ("empty", ("the folder is empty", "hart-export")),
        ("other things", ("found README.md, a/, b/", "hart-export")),
        ("many things", ("and 4 more",)),
        ("checkpoint", ("it is a checkpoint", "hart-export")),
        ("checkpoint's part", ("it is a checkpoint",)),
    ],
)
def test_what_is_no_bundle(tmp_path: Path, made: str, words: tuple[str, ...]) -> None:
    place = tmp_path / "place"
    if made == "file":
        place.write_text("x")
    elif made.startswith("checkpoint"):
        place = DEMO_CHECKPOINT / "llm" if "part" in made else DEMO_CHECKPOINT
    elif made != "nothing":
        place.mkdir()
    if made == "other things":
        (place / "README.md").write_text("x")
    for number in range({"other things": 2, "many things": 9}.get(made, 0)):
        (place / "abcdefghi"[number]).mkdir()
    with pytest.raises(InputError, match="no bundle here") as caught:
        find_bundle(place)
    assert str(caught.value).startswith(f"{place}: ")
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_may_not_be_read_hides_no_bundle(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's refusal is made by hand."""
    (engines / "locked").mkdir()
    real = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert find_bundle(engines) == engines / "demo"
    with pytest.raises(InputError, match="no bundle here"):
        find_bundle(engines / "locked")
