"""A share of ``make torture``: the same campaigns, with small counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.imports import ROOT
from tests.torture.outcomes import Outcome, Trial
from tests.torture.workers import Work, in_workers

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


def _hangs_or_dies() -> Work:
    def work(number: int) -> Trial:
        if number == 1:
            time.sleep(600)
        if number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return Trial("here", number, Outcome.EQUAL, "")

    return work


def test_what_hangs_and_what_dies_is_told_and_the_rest_goes_on() -> None:
    found = {trial.number: trial.outcome for trial in in_workers("here", _hangs_or_dies, range(5), 2, 1.0)}
    assert found == {**dict.fromkeys(range(5), Outcome.EQUAL), 1: Outcome.HANG, 2: Outcome.CRASH}
