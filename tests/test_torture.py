"""A share of ``make torture``: the same campaigns, with small counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT

SHARE: dict[str, list[object]] = {
    "fuzz": ["--trials", 60],
    "kills": ["--kills", 12, "--quick"],
    "places": ["--quick"],
    "soak": ["--pictures", 200],
}


@pytest.mark.parametrize("campaign", SHARE)
def test_a_share(demo_bundle: Path, campaign: str) -> None:
    """In a process of its own, which forks others and has no threads yet."""
    words = ["-m", "tests.torture", "--only", campaign, "--bundle", demo_bundle, *SHARE[campaign]]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "silent wrong" in done.stdout  # the table
