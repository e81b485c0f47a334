"""Nothing phones home: what commands leave behind, and whom they talk to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hart_runtime.common.install import installed
from hart_runtime.common.telemetry import OPENVINO_SENDER, SWITCHES

WATCHER = """
import os, sys
def told(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(int(os.environ["TOLD"]), f"{event} {args[-1]!r}\\n".encode())
sys.addaudithook(told)
"""
"""Of every Python process, before anything else is imported."""


def started(words: list[str], home: Path, **more: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A command with a home of its own, and the connections it opened."""
    home.mkdir()
    watcher = home.parent / "watcher"
    watcher.mkdir()
    (watcher / "sitecustomize.py").write_text(WATCHER)
    kept = {k: v for k, v in os.environ.items() if k not in SWITCHES and not k.startswith(("XDG_", "CI"))}
    path = os.pathsep.join([str(watcher), *filter(None, [os.environ.get("PYTHONPATH")])])
    reading, writing = os.pipe()
    try:
        environment = {**kept, "HOME": str(home), "PYTHONPATH": path, "TOLD": str(writing), **more}
        done = subprocess.run(
            words,
            env=environment,
            pass_fds=[writing],
            capture_output=True,
            text=True,
            cwd=home.parent,
            check=False,
        )
    finally:
        os.close(writing)
    with os.fdopen(reading) as told:
        return done, told.read()


def command(name: str, *words: object) -> list[str]:
    code = f"from hart_runtime.{name}.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, words)]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_drawing_leaves_nothing_and_talks_to_nobody(
    demo_bundle: Path, tmp_path: Path, backend: str
) -> None:
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    words = command("runtime", "--engine", demo_bundle, "a red circle", "--backend", backend)
    done, told = started([*words, "--output", "x.png"], tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "home").rglob("*")] == []
    assert told == ""


@pytest.mark.parametrize("name", ["export", "build", "bench", "compare"])
def test_help_and_dry_runs_talk_to_nobody(demo_bundle: Path, tmp_path: Path, name: str) -> None:
    words = ["--dry-run"] if name == "export" else ["--help"]
    module = {"build": "runtime.tensorrt"}.get(name, name)
    done, told = started(command(module, *words), tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "home").rglob("*")] == []
    assert told == ""


def test_the_watcher_sees_connections(tmp_path: Path) -> None:
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    _, told = started([sys.executable, "-c", code], tmp_path / "home")
    assert "socket.connect" in told


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("given", ["", "0", "1"])
def test_what_the_user_has_set_stays(tmp_path: Path, name: str, given: str) -> None:
    code = f"import os, hart_runtime; print(os.environ[{name!r}])"
    done, _ = started([sys.executable, "-c", code], tmp_path / "home", **{name: given})
    assert done.stdout == f"{given}\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{SWITCHES[name]}\n"


@pytest.mark.skipif(not installed("openvino"), reason="OpenVINO is not installed")
def test_only_openvino_is_kept_from_its_sender() -> None:
    code = f"""
import sys
from hart_runtime.runtime.backends.openvino import openvino
openvino()
assert {OPENVINO_SENDER!r} not in sys.modules
import {OPENVINO_SENDER}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
