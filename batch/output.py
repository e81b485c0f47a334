"""The folder of a run: pictures, what is known of each, and what a run that is started again goes on from.

One process writes, wherever pictures are drawn: nothing is missing or double, and no disk has to be shared.
A line of the journal is written when its picture is whole; what was cut off with the process is drawn again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hart_runtime.batch.plan import Picture, Plan, alike
from hart_runtime.batch.shards import Shards
from hart_runtime.common.errors import NO_ROOM, NOTE, InputError, RunError, named, shown
from hart_runtime.common.files import LEFT, whole_file, whole_folder
from hart_runtime.common.json_files import parse_json, read_json

log = logging.getLogger(__name__)

RUN, JOURNAL, TABLE, PICTURES = "run.json", "journal.jsonl", "table.parquet", "pictures"
PER_FOLDER = 1000
"""Pictures of a folder, or of a shard."""


@dataclass(frozen=True)
class Run:
    """What a folder belongs to: a run that differs in any of these writes other files."""

    prompts: str
    """sha256 of the plan."""
    bundle: str
    """Its identity."""
    device: str
    backend: str
    shards: bool
    version: str
    """Of this package."""
    size: int | None = None
    """Of the pictures, where it was asked for."""


@dataclass(frozen=True)
class Finished:
    """What became of a picture: its file, or why there is none."""

    number: int
    seconds: float
    """Its share of the time of its batch."""
    sha256: str | None = None
    error: str | None = None
    png: bytes | None = None


class Output:
    """An open folder; made by :func:`open_output`."""

    def __init__(self, folder: Path, plan: Plan, shards: bool) -> None:
        self.folder, self.plan = folder, plan
        self.shards = Shards(folder, PER_FOLDER) if shards else None
        self.journal = _Journal(folder / JOURNAL)
        self.lines = self.journal.read(len(plan.pictures))
        self._forget_what_is_gone()

    @property
    def left(self) -> list[Picture]:
        """Pictures that are to be drawn yet, those that are alike together, so that batches are full."""
        left = (picture for picture in self.plan.pictures if picture.number not in self.lines)
        return sorted(left, key=alike)

    def add(self, finished: Finished) -> None:
        """Write a picture, or why there is none.

        Raises:
            RunError: it cannot be written.
        """
        line: dict[str, Any] = {"number": finished.number, "seconds": round(finished.seconds, 6)}
        if finished.png is None:
            line["error"] = finished.error
        else:
            line |= self._written(self.plan.pictures[finished.number], finished.png)
            line["sha256"] = finished.sha256
        self.journal.add(line)
        self.lines[finished.number] = line

    def end(self) -> None:
        """Write the table of all pictures that are finished, and close."""
        from hart_runtime.batch.table import write_table

        if self.shards is not None:
            self.shards.close(whole=not self.left)
        write_table(self.folder / TABLE, self.plan, self.lines)

    def _written(self, picture: Picture, png: bytes) -> dict[str, Any]:
        name = f"{picture.number:08}"
        if self.shards is not None:
            settings = asdict(self.plan.settings[picture.settings])
            told = {"prompt": picture.prompt, "seed": picture.seed, "row": picture.row, "settings": settings}
            return self.shards.add(name, {"png": png, "json": json.dumps(told).encode()})
        file = Path(PICTURES, f"{picture.number // PER_FOLDER:05}", f"{name}.png")
        with _told_of_writing(self.folder):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(self.folder / file) as stream:
                stream.write(png)
        except InputError as error:  # what was not there when the run began
            raise RunError(str(error)) from None
        return {"file": str(file)}

    def _forget_what_is_gone(self) -> None:
        """Pictures whose files somebody took away, or a machine that lost its power."""
        if self.shards is not None:
            there = self.shards.go_on(self.lines)
        else:
            there = {number for number, line in self.lines.items() if self._is_there(line)}
        for path in (*self.folder.glob(".*"), *(self.folder / PICTURES).glob("*/.*")):
            if LEFT.fullmatch(path.name):  # of a run that was killed
                path.unlink(missing_ok=True)
        if gone := self.lines.keys() - there:
            log.log(NOTE, "%s: %d pictures are gone, and drawn again", self.folder, len(gone))
            self.lines = {number: self.lines[number] for number in sorted(there)}

    def _is_there(self, line: dict[str, Any]) -> bool:
        return "file" not in line or (self.folder / line["file"]).is_file()


class _Journal:
    """A line of JSON for every picture that is finished; of two for one picture the later counts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream: IO[bytes] | None = None

    def read(self, count: int) -> dict[int, dict[str, Any]]:
        """By number; a line that a killed run began is cut off.

        Raises:
            InputError: something else stands there.
        """
        raw = self.file.read_bytes() if self.file.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with self.file.open("r+b") as stream:
                stream.truncate(len(whole))
        lines: dict[int, dict[str, Any]] = {}
        for place, text in enumerate(whole.decode(errors="replace").splitlines(), start=1):
            line = parse_json(text, f"{self.file}: line {place}")
            number = line.get("number")
            if not isinstance(number, int) or not 0 <= number < count:
                raise InputError(
                    f"{self.file}: line {place}: expected 0 to {count - 1} as number, found {shown(number)}"
                )
            lines[number] = line
        return lines

    def add(self, line: dict[str, Any]) -> None:
        with _told_of_writing(self.file):
            if self._stream is None:
                self._stream = self.file.open("ab", buffering=0)
            self._stream.write(json.dumps(line).encode() + b"\n")


@contextlib.contextmanager
def open_output(folder: Path, plan: Plan, run: Run) -> Iterator[Output]:
    """The folder of a run, new or gone on with; nobody else writes there until the block ends.

    Raises:
        InputError: it holds something else, or another run, or another process writes there.
        RunError: it cannot be written.
    """
    file = folder / RUN
    if not file.exists():
        with whole_folder(folder, lambda path: False) as new:  # a folder that is there must be empty
            (new / RUN).write_text(json.dumps({"schema": 1, **asdict(run)}, indent=1) + "\n")
    with file.open("r+b") as stream:  # some disks lock only what may be written
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another hart-batch writes there; wait for it, or end it") from None
        except OSError:  # a disk without locks
            pass
        check_run(folder, run)
        yield Output(folder, plan, run.shards)


def check_run(folder: Path, run: Run) -> None:
    """Refuse a folder that belongs to another run, or to no run; one that is not there is fine.

    Raises:
        InputError: with what differs.
    """
    file = folder / RUN
    if not file.exists():
        if folder.is_dir() and (
            there := sorted(p.name for p in folder.iterdir() if not LEFT.fullmatch(p.name))
        ):
            raise InputError(
                f"{folder}: holds {named(there[0])} and no run of hart-batch; give another `output`"
            )
        return
    found = read_json(file)
    for name, value in {"schema": 1, **asdict(run)}.items():
        if found.get(name) != value:
            raise InputError(
                f"{folder}: belongs to another run, whose {name} is {shown(found.get(name))}, here it is "
                f"{shown(value)}; give another `output`"
            )


@contextlib.contextmanager
def _told_of_writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunError(f"{place}: could not be written ({error.strerror})") from None
