"""The fuzzer: one file of a bundle, checkpoint, picture or folder of engines is changed, and tried.

Each trial is made from the seed and its number alone, in a process that may die of it.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.torture.checkpoints import Checkpoints
from tests.torture.outcomes import Outcome, Trial
from tests.torture.subjects import Bundles, Engines, Ground, Pictures
from tests.torture.workers import Work, in_workers

SUBJECTS: dict[str, Callable[[Ground], Any]] = {
    "bundles": Bundles,
    "checkpoints": Checkpoints,
    "engines": Engines,
    "pictures": Pictures,
}
SHARES = {"bundles": 6, "checkpoints": 2, "engines": 1, "pictures": 1}
SECONDS = 30.0
"""After which a trial hangs: a hundred times what it takes."""
MOST_MEMORY = 8 << 30
MOST_PRINTED = 10
"""Lines that libraries may print about one trial."""


def fuzz(
    ground: Ground, seed: int, numbers: Iterable[int], workers: int, keep: bool = False
) -> Iterator[Trial]:
    """Trials by their numbers, in the order in which they end."""
    import torch  # noqa: F401  (before the fork, so that no worker has to)

    yield from in_workers("fuzz", lambda: _worker(ground, seed, keep), numbers, workers, SECONDS)


def _own(ground: Ground, folder: Path) -> Ground:
    """A copy of what is changed, for one worker.

    Trials share files by links, and each new link changes the times of its file, for which a bundle that is
    being opened would be refused, whatever was changed in it.
    """
    bundle, checkpoint, engines = (
        Path(shutil.copytree(source, folder / source.name))
        for source in (ground.bundle, ground.checkpoint, ground.engines)
    )
    return Ground(bundle, checkpoint, ground.picture, engines)


def _worker(ground: Ground, seed: int, keep: bool) -> Work:
    """What does a trial; subjects are made when they first come up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    here = ground.bundle.parent / f"worker-{os.getpid()}"
    here.mkdir()
    ground = _own(ground, here)
    printed = here / "printed"
    descriptor = os.open(printed, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    subjects: dict[str, Any] = {}

    def trial(number: int) -> Trial:
        rng = random.Random(f"{seed}:{number}")
        name = rng.choices(list(SHARES), list(SHARES.values()))[0]
        subject = subjects.get(name) or subjects.setdefault(name, SUBJECTS[name](ground))
        folder = here / f"trial-{number}"
        os.ftruncate(descriptor, 0)
        try:
            outcome, said = subject.trial(folder, rng)
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        lines = printed.read_bytes().count(b"\n")
        if lines > MOST_PRINTED and outcome is Outcome.REFUSED:
            outcome, said = Outcome.TRACEBACK, f"{said} and {lines} lines on stderr"
        return Trial(name, number, outcome, said)

    return trial
