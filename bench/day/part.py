"""One part of the day: a process with a time limit, whose result is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import hart_runtime
from hart_runtime.common.errors import RunError

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
MOST_SECONDS = 600
LAST_WORDS = 300
"""Characters of what a part said last that its result keeps."""


@dataclass(frozen=True)
class Part:
    """A process."""

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    """What it cannot run without: names that a machine may lack."""
    makes: str | None = None
    """A file or folder in the day's; what an attempt before left there is removed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = MOST_SECONDS


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    verdict: str
    said: str
    """What it said last, or why it did not run."""
    seconds: float = 0.0


def result_of(part: Part, folder: Path) -> Path:
    """What is there once a part has passed."""
    return folder / f"{part.name}.passed.json"


def run_part(part: Part, folder: Path, lacks: Mapping[str, str], where: Path) -> Outcome:
    """Run a part, unless it has passed before or something is lacking.

    Args:
        folder: of the day, where every part leaves ``NAME.log`` too.
        where: the folder that it runs in.
    """
    kept = result_of(part, folder)
    if kept.is_file():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    if missing := [lacks[name] for name in part.needs if name in lacks]:
        return Outcome(part.name, NOT_RUN, missing[0])
    if part.makes:
        _remove(folder / part.makes)
    log = folder / f"{part.name}.log"
    start = time.perf_counter()
    try:
        code = _run(part, log, where)
    except RunError as error:
        return Outcome(part.name, FAILED, str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    said = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1][:LAST_WORDS]
    if code:
        return Outcome(part.name, FAILED, f"exit code {code}: {said}", seconds)
    outcome = Outcome(part.name, PASSED, said, seconds)
    partial = kept.with_suffix(".part")
    partial.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    partial.replace(kept)
    return outcome


def _run(part: Part, log: Path, where: Path) -> int:
    """Its exit code; RunError after its time, with all that it started ended."""
    here = str(Path(hart_runtime.__file__).parent.parent)
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), here) if p)
    environment = {**os.environ, **part.environment, "PYTHONPATH": path}
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=where,
            start_new_session=True,
        )
        try:
            return process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"took longer than {part.seconds:.0f} s and was ended; see {log}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
