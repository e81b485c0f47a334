"""Runs README: every block in its order, in a copy of the clone, but for those marked with a reason.

Then those of docs/coming-from.md, in what README leaves behind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.clones import copy_of_clone
from tests.imports import ROOT

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
NOT_RUN = 14
"""Blocks that README marks. Fewer is better; another one has to be counted here, with a reason there."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    reason: str | None
    """Why it is not run."""

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return ["python", "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def blocks(page: str = "README.md") -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a fence that is not read here"
    return [Block(m["language"], m["text"], m["reason"]) for m in BLOCK.finditer(text)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git tracks, with this environment in its place."""
    folder = copy_of_clone(tmp_path / "clone")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_reasons_are_given_and_counted() -> None:
    found = blocks()
    assert {block.language for block in found} == {"sh", "python"}
    reasons = [block.reason for block in found if block.reason is not None]
    assert len(reasons) == NOT_RUN
    allowed = ("GPU", "hub", "installs", "takes", "stand for", "make test runs it")
    assert [reason for reason in reasons if not any(word in reason for word in allowed)] == []


def test_the_literal_commands_are_there() -> None:
    """As people type them; they run below, and after ``make demo`` in .ci/run."""
    run = "".join(block.text for block in blocks() if block.reason is None)
    for line in (
        "hart-export --precision fp16\n",
        'hart-run --engine engines/ "a red circle on a white background"\n',
    ):
        assert line in run
        assert line in (ROOT / ".ci" / "run").read_text()


@pytest.mark.release
def test_every_block_runs(clone: Path) -> None:
    environment = {**os.environ, "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}", "COLUMNS": "120"}
    environment |= {"PYTHONPATH": str(clone / "src"), "PYTHONUNBUFFERED": "1"}
    for block in [*blocks(), *blocks("docs/coming-from.md")]:
        if block.reason is not None:
            continue
        start = time.monotonic()
        done = subprocess.run(
            block.command, cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        print(f"--- {time.monotonic() - start:.0f} s\n{block.text}{done.stdout}{done.stderr}")
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    for name in ("out.png", "star.png", "four-0.png", "four-3.png", "scale0.png"):
        assert Image.open(clone / name).size == (64, 64)
    assert (clone / "again.png").read_bytes() == (clone / "four-3.png").read_bytes()
