"""What is on disk stays the user's: nothing but our own is replaced, links are followed, modes are kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.files import (
    check_output,
    clear_leftovers,
    refuse_strangers,
    whole_file,
    whole_folder,
)
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.reference import DESCRIPTION, TRAJECTORY, check_reference_place
from hart_runtime.export.cli import main as export
from hart_runtime.export.request import Request, check_place
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.owned import owned_by_bundle, owned_by_engines
from hart_runtime.runtime.png import Origin, save_png
from hart_runtime.runtime.tensorrt.manifest import ENGINE_MANIFEST

PROMPT = "a red circle on a white background"
ORIGIN = Origin("p", 1, SamplingSettings(), "b", "i")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture
def _umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def drawn(*arguments: object) -> Result:
    return CliRunner().invoke(run, [PROMPT, *(str(a) for a in arguments)])


@pytest.mark.parametrize(
    "mine", ["notes.txt", "pictures/a.txt", "empty/", "tensorrt-rtx-1.7/notes.txt", ".git/x"]
)
def test_force_replaces_no_file_of_the_users(bundle: Path, mine: str) -> None:
    (engines := bundle / "tensorrt-rtx-1.7").mkdir()
    (engines / ENGINE_MANIFEST).write_text("{}")
    (engines / "decoder.engine").write_text("x")
    request = Request(find_checkpoint(DEMO_CHECKPOINT), "fp16")
    assert not check_place(request, bundle, force=True)  # its own engines may go
    place = bundle / mine
    place.parent.mkdir(exist_ok=True)
    if mine.endswith("/"):
        place.mkdir()
    else:
        place.write_text("work")
    before = contents(bundle)
    done = CliRunner().invoke(export, ["--output", str(bundle), "--backend", "onnxruntime", "--force"])
    assert done.exit_code == 2
    assert f"{bundle}: holds {mine}" in done.stderr
    assert contents(bundle) == before


@pytest.mark.parametrize("text", ['{"name": "my web app"}', '{"schema": "3"}', "[]", "{", '{"schema": 3}'])
def test_a_manifest_of_something_else_is_no_bundle(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    (tmp_path / "index.html").write_text("work")
    done = CliRunner().invoke(export, ["--output", str(tmp_path), "--backend", "onnxruntime", "--force"])
    assert done.exit_code == 2
    assert "not a bundle" in done.stderr
    assert contents(tmp_path) == {MANIFEST: text.encode(), "index.html": b"work"}


def test_a_damaged_bundle_can_be_replaced(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")
    owned = owned_by_bundle(bundle)
    assert owned is not None
    refuse_strangers(bundle, owned)
    (bundle / "mine.onnx").write_text("work")
    with pytest.raises(InputError, match=r"holds mine\.onnx"):
        refuse_strangers(bundle, owned)


def test_the_folder_we_are_in_is_not_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    for place in (".", str(bundle), f"../{bundle.name}"):
        done = CliRunner().invoke(export, ["--output", place, "--backend", "onnxruntime", "--force"])
        assert done.exit_code == 2
        assert "the folder you are in" in done.stderr


OURS: dict[str, tuple[list[str], Callable[[Path], object]]] = {
    "engines": ([ENGINE_MANIFEST, "decoder.engine"], lambda f: refuse_strangers(f, owned_by_engines)),
    "reference": ([DESCRIPTION, TRAJECTORY, "calls/x.inputs.json"], check_reference_place),
}


@pytest.mark.parametrize("mine", ["notes.txt", "calls/notes.txt", "more/decoder.engine"])
@pytest.mark.parametrize("kind", OURS)
def test_other_folders_that_are_replaced(tmp_path: Path, kind: str, mine: str) -> None:
    names, check = OURS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"schema": 2, "patch_nums": [], "made_with": {}}))
    check(tmp_path)
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("work")
    with pytest.raises(InputError, match=f"holds {mine}"):
        check(tmp_path)


def test_a_reference_of_something_else(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text('{"mine": 1}')
    with pytest.raises(InputError, match="is not a reference"):
        check_reference_place(tmp_path)


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "old").mkdir(parents=True)
    (tmp_path / "disk" / "old" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "old")
    with whole_folder(tmp_path / "link", lambda _: True) as partial:
        assert partial.parent == tmp_path / "disk"
        (partial / "b").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk") == {"old/b": b"new"}


@pytest.mark.parametrize("failing", ["the work", "the exchange"])
def test_what_was_there_comes_back(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place := tmp_path / "x").mkdir()
    (place / "a").write_text("old")
    if failing == "the exchange":
        monkeypatch.setattr("hart_runtime.common.files._exchange", lambda *_: False)
        with whole_folder(place, lambda _: True) as partial:
            (partial / "b").write_text("new")
        assert contents(tmp_path) == {"x/b": b"new"}
        return
    with pytest.raises(RunError, match="nothing was changed"), whole_folder(place, lambda _: True) as partial:
        raise OSError(28, "No space left on device", str(partial / "b"))
    assert contents(tmp_path) == {"x/a": b"old"}


KILLED = """
import os, signal, sys
from pathlib import Path
from hart_runtime.common.files import whole_file, whole_folder
place = Path(sys.argv[1])
with (whole_file(place) if place.suffix else whole_folder(place, lambda _: True)) as opened:
    print("there", flush=True)
    sys.stdin.read() if len(sys.argv) > 2 else os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["folder", "x.png", "a[b] c"])
def test_what_a_killed_run_left_is_removed_and_said(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a run that goes on is writing stays."""
    place = tmp_path / name
    command = [sys.executable, "-c", KILLED, str(place)]
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        (writing,) = tmp_path.iterdir()
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        (left,) = set(tmp_path.iterdir()) - {writing}
        clear_leftovers(place)
        assert caplog.messages == [f"{left}: removed, a run that was killed had left it"]
        assert list(tmp_path.iterdir()) == [writing]
        running.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    (aside := tmp_path / ".x-0123abcd.aside").mkdir()
    (aside / "a").write_text("old")
    with whole_folder(tmp_path / "x", lambda _: True) as partial:
        assert contents(tmp_path / "x") == {"a": b"old"}
        (partial / "b").write_text("new")
    assert contents(tmp_path) == {"x/b": b"new"}


@pytest.mark.usefixtures("_umask")
def test_the_umask_is_honoured_and_modes_are_kept(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    image = Image.new("RGB", (2, 2))
    save_png(image, tmp_path / "new.png", ORIGIN)
    with whole_folder(tmp_path / "folder"):
        pass
    assert (mode(tmp_path / "new.png"), mode(tmp_path / "folder")) == (0o600, 0o700)
    for kept in (0o600, 0o640, 0o664):
        (tmp_path / "old.png").touch()
        (tmp_path / "old.png").chmod(kept)
        save_png(image, tmp_path / "old.png", ORIGIN)
        assert mode(tmp_path / "old.png") == kept


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for target in ("there.png", "new.png"):
        link = tmp_path / f"link-{target}"
        link.symlink_to(tmp_path / "disk" / target)
        if target == "there.png":
            link.write_text("old")
        save_png(Image.new("RGB", (2, 2)), link, ORIGIN)
        assert link.is_symlink()
        assert Image.open(tmp_path / "disk" / target).size == (2, 2)
    assert sorted(contents(tmp_path / "disk")) == ["new.png", "there.png"]


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "circle", "locked"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x.png"
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/null")
    elif kind == "folder":
        place.mkdir()
    elif kind == "circle":
        place.symlink_to(place)
    else:
        place.write_text("mine")
        place.chmod(0o444)
    before = place.lstat()
    with pytest.raises(InputError, match=r"x\.png: "):
        check_output(place)
    with pytest.raises((InputError, RunError)), whole_file(place):
        pass
    assert place.lstat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("spelled", ["x.png", "link.png", "../pictures/x.png", "hard.png"])
def test_a_picture_does_not_replace_what_it_is_drawn_from(
    demo_bundle: Path, tmp_path: Path, spelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "pictures").mkdir()
    monkeypatch.chdir(here)
    assert drawn("--engine", demo_bundle, "--output", "x.png").exit_code == 0
    Path("link.png").symlink_to("x.png")
    os.link("x.png", "hard.png")
    before = Path("x.png").read_bytes()
    options = ["--engine", str(demo_bundle), "--from-image", "x.png", "--output", spelled]
    done = CliRunner().invoke(run, options)
    if spelled == "hard.png":  # another name: the old one keeps what it holds
        assert done.exit_code == 0, done.output
    else:
        assert done.exit_code == 2
        assert "give another --output" in done.stderr
    assert Path("x.png").read_bytes() == before


def test_nor_prompts_nor_into_the_bundle(bundle: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.png").write_text(f"{PROMPT}\n")
    done = CliRunner().invoke(
        run, ["--engine", str(bundle), "--prompts-file", str(prompts), "--output", str(prompts)]
    )
    assert done.exit_code == 2
    assert prompts.read_text() == f"{PROMPT}\n"
    done = drawn("--engine", bundle, "--output", bundle / "x.png")
    assert done.exit_code == 2
    assert "lies in the bundle" in done.stderr
    assert (bundle / WEIGHTS).is_file()


def test_earlier_pictures(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default name replaces none; a name that is given says so."""
    monkeypatch.chdir(tmp_path)
    few = ("--engine", demo_bundle, "--steps", 2)
    for expected in (["out.png"], ["out-2.png"], ["out-3.png"]):
        done = drawn(*few)
        assert done.stdout.splitlines()[-len(expected) :] == expected
        assert "replaced" not in done.stderr
    several = drawn(*few, "--num-images", 2)
    assert several.stdout.splitlines()[-2:] == ["out-0.png", "out-1.png"]
    several = drawn(*few, "--num-images", 2)
    assert several.stdout.splitlines()[-2:] == ["out-2-0.png", "out-2-1.png"]
    assert "note: out.png: there already, replaced" in drawn(*few, "--output", "out.png").stderr
    named = drawn(*few, "--num-images", 3, "--output", "out.png")
    assert "note: out-0.png and 2 more: there already" in named.stderr
