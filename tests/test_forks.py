"""A pipeline in a process that was forked draws, or refuses with a sentence; it never waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, threading, warnings
from hart_runtime import InputError, Pipeline
warnings.simplefilter("ignore")
pipeline = Pipeline.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]))
words = {"prompts": ["a red circle", "a blue star"], "smooth": True}
expected = [image.tobytes() for image in pipeline(**words)]

def forked():
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        print("same" if [image.tobytes() for image in pipeline(**words)] == expected else "another")
    except InputError as error:
        print("refused:", error)
    sys.stdout.flush()
    os._exit(0)

"""
WHEN = {
    "idle": "forked()",
    "from a thread": "thread = threading.Thread(target=forked); thread.start(); thread.join()",
    "between pictures": "drawing = pipeline.batches(batch=1, **words); next(drawing); forked()",
    "in a callback": "pipeline(callback=lambda scale: forked() if scale.index == 1 else None, **words)",
    "while another thread draws": """
there, done = threading.Event(), threading.Event()
def wait(scale):
    there.set()
    done.wait()
thread = threading.Thread(target=lambda: pipeline(callback=wait, **words))
thread.start()
there.wait()
forked()
done.set()
thread.join()
""",
}
REFUSED = ("in a callback", "while another thread draws")
"""Whatever the threads; with several of them it is refused always, since they stay behind."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("when", WHEN)
def test_after_a_fork(demo_bundle: Path, when: str, threads: int) -> None:
    words = [sys.executable, "-c", SCRIPT + WHEN[when], str(demo_bundle), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    refused = threads > 1 or when in REFUSED
    said = "refused: this process was forked after the pipeline was loaded" if refused else "same"
    assert done.stdout.startswith(said)
    assert done.stdout.count("\n") == 1
