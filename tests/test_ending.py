"""How commands end: exit codes, signals, pipes, full devices, and user text that looks like ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from hart_runtime.bench.cli import main as bench
from hart_runtime.common.console import command
from hart_runtime.common.errors import InputError, RunError, parameter
from hart_runtime.compare.cli import main as compare
from hart_runtime.export.cli import main as export
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.cli import main as run
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.tensorrt.cli import main as build

PROMPT = "a red circle on a white background"
ROOMS = {
    "run": "runtime",
    "export": "export",
    "compare": "compare",
    "bench": "bench",
    "build": "runtime.tensorrt",
}
COMMANDS = {"run": run, "export": export, "build": build, "compare": compare, "bench": bench}
HEARS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""Whoever runs the tests in the background may have these ignored, and children inherit it."""
SCRIPT = "from hart_runtime.{}.cli import main; main()"


def started(name: str, *arguments: object, before: str = "", **options: Any) -> subprocess.Popen[str]:
    script = HEARS + before + SCRIPT.format(ROOMS[name])
    words = [sys.executable, "-c", script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(words, text=True, **pipes)


WAITS = """
import time, hart_runtime.runtime.bundle as b, hart_runtime.common.checkpoint as c
def wait(*_, **__):
    print("there", flush=True)
    time.sleep(60)
b.open_bundle = c.find_checkpoint = wait
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("name", ROOMS)
def test_signals(name: str, number: int, code: int, tmp_path: Path) -> None:
    if (name, number) in {("compare", signal.SIGHUP), ("export", signal.SIGHUP), ("bench", signal.SIGTERM)}:
        return  # the same code for all: a few are enough
    place = [] if name == "export" else ["--engine", tmp_path]
    with started(name, *([PROMPT] if name == "run" else []), *place, before=WAITS, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n", process.communicate()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == "stopped\n"


@command()
@click.argument("kind")
def failing(kind: str) -> None:
    """Fail in one of many ways."""
    errors: dict[str, BaseException] = {
        "input": InputError("x"),
        "run": RunError("x"),
        "memory": MemoryError(),
        "disk": OSError(28, "No space left on device", "x"),
        "quota": OSError(122, "Disk quota exceeded"),
        "permission": PermissionError(13, "Permission denied", "x"),
        "pipe": BrokenPipeError(32, "Broken pipe"),
        "ctrl-c": KeyboardInterrupt(),
    }
    raise errors[kind]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("input", 2),
        ("run", 1),
        ("memory", 1),
        ("disk", 1),
        ("quota", 1),
        ("permission", 2),
        ("pipe", 141),
        ("ctrl-c", 130),
    ],
)
def test_exit_codes(kind: str, code: int) -> None:
    done = CliRunner().invoke(failing, [kind])
    assert done.exit_code == code
    assert len(done.stderr.splitlines()) == (0 if kind == "pipe" else 1)


def test_a_command_in_another_thread(demo_bundle: Path, tmp_path: Path) -> None:
    """And in this one: it leaves no handler of signals behind."""
    before, codes = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        codes.append(CliRunner().invoke(failing, ["run"]).exit_code)

    (thread := threading.Thread(target=work)).start()
    thread.join()
    work()
    assert codes == [1, 1]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--json"]])
@pytest.mark.parametrize("sink", ["closed pipe", "full device", "closed"])
def test_output_that_goes_nowhere(demo_bundle: Path, tmp_path: Path, sink: str, arguments: list[str]) -> None:
    drawing = arguments == ["--json"]
    words = [PROMPT, "--engine", demo_bundle, "--output", tmp_path / "x.png", "--steps", 2, *arguments]
    if sink == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        process = started("run", *words, stdout=write)
        os.close(write)
    elif sink == "full device":
        with Path("/dev/full").open("w") as full:
            process = started("run", *words, stdout=full)
    else:
        process = started("run", *words, before="import sys; sys.stdout = None\n")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == {"closed pipe": 141, "full device": 1, "closed": 0}[sink], stderr
    lines = stderr.splitlines()
    assert len(lines) == (1 if sink == "full device" else 0), stderr
    assert (tmp_path / "x.png").exists() is drawing


def test_a_picture_that_does_not_fit_is_a_failed_run(demo_bundle: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    words = [PROMPT, "--engine", demo_bundle, "--output", tmp_path / "x.png", "--steps", 2]
    with started("run", *words, before=limit) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'x.png'}: could not be written (File too large"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["`seed`", "a `device='cuda'` b", "`", "it's `force`", "[red] `x`"])
def test_backticks_of_users_are_theirs(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(run, [PROMPT, "--engine", str(tmp_path / path)])
    assert f"error: {tmp_path / path}: no bundle here" in done.stderr
    (tmp_path / path).mkdir()
    monkeypatch.chdir(tmp_path / path)
    done = CliRunner().invoke(run, [PROMPT, "--engine", "none", "--output", "x.jpg"])
    assert "--output x.jpg: expected a file ending in .png" in done.stderr
    done = CliRunner().invoke(run, [PROMPT, "--engine", "none", "--output", f"{path}.jpg"])
    assert "expected a file ending in .png" in done.stderr
    assert path.replace("'", "") in done.stderr.replace("'\"'\"'", "").replace("'", "")
    assert "--device" not in done.stderr
    assert "--seed" not in done.stderr


def test_a_value_with_backticks_is_one_parameter() -> None:
    assert parameter("output", "a `b` c").count("`") == 2


NAMES = [
    "[/red]",
    "x[/y]",
    "bundles [red]",
    "[link=file:///etc]x[/link]",
    ":smile: [bold",
    "a/../../b",
    "../x",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(export, [str(DEMO_CHECKPOINT), "--dry-run", "--output", str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    assert f"would write {tmp_path / name} in fp16" in done.stdout


def test_names_of_bundles(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result lies where results lie, and is told of, whatever a bundle calls itself."""
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    values = json.loads((bundle / MANIFEST).read_text())
    monkeypatch.chdir(tmp_path)
    name = "../[/red] :smile: a/../../b"
    (bundle / MANIFEST).write_text(json.dumps({**values, "name": name}))
    done = CliRunner().invoke(bench, ["--engine", str(bundle), "--iterations", "1", "--warmup", "1"])
    assert done.exit_code == 0, done.output
    assert name in done.stdout.replace("\n", " ")
    (result,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert (result / "bench.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["benchmarks", "bundle"]
    compared = CliRunner().invoke(bench, ["compare", str(result), str(result)])
    assert "0 of 0 quantities changed; " in compared.stdout
    assert "could not be judged" in compared.stdout
    assert "--iterations 4" in compared.stdout
    everything = CliRunner().invoke(bench, ["compare", str(result), str(result), "--all"])
    assert "(too few samples)" in everything.stdout
    assert "(noise)" not in everything.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("export", ["--text-encoder", ""]),
        ("export", ["--revision", ""]),
        ("export", ["--system-prompt", " "]),
        ("export", [""]),
        ("export", ["--output", " "]),
        ("run", ["--output", ""]),
        ("run", ["--safety-model", ""]),
        ("run", ["--steps", ""]),
        ("build", ["--compute-capability", ""]),
        ("compare", ["--layers", ""]),
        ("bench", ["--against", ""]),
    ],
)
def test_a_variable_that_is_not_set(
    demo_bundle: Path, tmp_path: Path, name: str, arguments: list[str]
) -> None:
    place = [] if name == "export" else ["--engine", str(demo_bundle)]
    prompt = [PROMPT] if name == "run" else []
    with CliRunner().isolated_filesystem(tmp_path) as here:
        done = CliRunner().invoke(COMMANDS[name], [*prompt, *place, *arguments])
        assert list(Path(here).iterdir()) == []
    assert done.exit_code == 2
    assert "empty" in done.stderr
