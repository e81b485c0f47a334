"""A machine that gives no thread and no memory: one sentence and exit code 1, and nobody waits for ever."""

from __future__ import annotations

import _thread
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hart_runtime.common import room
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.hashing import sha256_of_pieces
from hart_runtime.common.room import can_start, failure, told_of_room
from hart_runtime.common.telemetry import OPENVINO_SENDER
from tests.test_ending import PROMPT, started

LIMITED = """
import resource
from hart_runtime.common.telemetry import kept_out
with kept_out({sender!r}):
    import {library}
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + ({more} << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""
MB = [8, 40, 90]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
@pytest.mark.parametrize("more", MB)
@pytest.mark.parametrize(
    ("backend", "threads"), [("onnxruntime", 1), ("onnxruntime", 2), ("onnxruntime", 64), ("openvino", 2)]
)
def test_no_room_is_a_failed_run(
    demo_bundle: Path, tmp_path: Path, backend: str, threads: int, more: int
) -> None:
    limit = LIMITED.format(sender=OPENVINO_SENDER, library=backend, more=more)
    words = ["--engine", demo_bundle, "--backend", backend, "--device", "cpu", "--threads", threads]
    with started("run", PROMPT, *words, "--json", "--output", tmp_path / "x.png", before=limit) as process:
        stdout, stderr = process.communicate()
    if process.returncode in {-signal.SIGABRT, 127}:  # a library ended it
        assert re.search(r"memory allocation of|cannot allocate memory|bad_alloc", stderr), stderr
        return
    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stderr.partition("Exception ignored")[0]  # which Python tells by itself
    assert "export the bundle again" not in stderr
    assert stdout == ""
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "reason",
    [
        "Exception during initialization: std::bad_alloc",
        "PosixThread pthread_create failed, error code: 11",
        "libopenvino.so: failed to map segment from shared object",
        "Resource temporarily unavailable",
        "Failed to allocate memory for requested buffer of size 4194304",
        f"{'namespace::' * 100}CudaCall() CUDA failure 2: out of memory",
        f"bad_alloc {'x' * 2000}",
    ],
)
def test_words_of_libraries_that_mean_the_machine(reason: str) -> None:
    error = failure("graph", reason, "export it again")
    assert isinstance(error, RunError)
    assert len(str(error)) < 600
    assert isinstance(failure("graph", "unknown operator", "export it again"), InputError)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit on tasks, which root does not have."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)


def test_files_are_hashed_without_threads(tmp_path: Path, no_threads: None) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_pieces(tmp_path / "file")[0].startswith("ba7816bf")
    assert not can_start(1)
    assert can_start(0)


def test_a_refused_thread_is_told(no_threads: None) -> None:
    with pytest.raises(RunError, match=r"the system gave no room \(can.t start new thread\)"), told_of_room():
        threading.Thread().start()
    with pytest.raises(RuntimeError, match="another"), told_of_room():
        raise RuntimeError("another")


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_a_thread_that_never_begins_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, begin: int) -> None:
    """The system gave it, and it found no memory to begin with."""
    start = _thread.start_new_thread
    left = iter(range(begin))
    monkeypatch.setattr(
        _thread, "start_new_thread", lambda *words: start(*words) if next(left, None) is not None else 0
    )
    monkeypatch.setattr(room, "PATIENCE", 0.2)
    assert not can_start(4)


def test_threads_that_were_tried_end() -> None:
    before = _thread._count()
    assert can_start(40)
    while _thread._count() > before:  # the last of them are about to end
        time.sleep(0.01)
