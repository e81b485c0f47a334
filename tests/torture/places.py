"""Full disks and bare environments: the picture is written, or its loss is said.

Exit code 0 goes with whole pictures, 1 (or 2 before anything was drawn) with one line that says what is lost
and nothing half beside it; and what ``--json`` prints can be read by a program, whatever libraries say.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hart_runtime.runtime.tensorrt.timing_cache import TIMINGS
from tests.torture.outcomes import Outcome, Trial
from tests.torture.subjects import PROMPT, SEED, Ground

SECONDS = 300
DRAW = "from hart_runtime.runtime.cli import main; main()"
EXPORT = "from hart_runtime.export.cli import main; main()"
BUILD = """
from tests.torture.ground import on_a_strict_machine
on_a_strict_machine()
from hart_runtime.runtime.tensorrt.cli import main
main()
"""
FILE_LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""
WITHOUT_RIGHTS = """
import ctypes
version_3_of_myself, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
if ctypes.CDLL(None).capset(version_3_of_myself, nothing):
    raise OSError("capset")
"""
"""What root may do beyond others: permissions and quotas hold for it then."""
PLAIN = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class NotHere(Exception):  # noqa: N818
    """This machine has no such place."""


@dataclass(frozen=True)
class Place:
    """Where a command runs."""

    name: str
    codes: tuple[int, ...] = (0,)
    """What it may end with."""
    mount: str | None = None
    """Options of a tmpfs for the output."""
    before: str = ""
    """What the process does first."""
    drop: tuple[str, ...] = ()
    """Variables that are not set."""
    variables: dict[str, str] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    """Of standard input, output and error."""
    filled: int | None = None
    """Bytes that are left in the output's folder."""
    prompt: str = PROMPT
    output: str = "out.png"


PLACES = [
    Place("a disk without room", (1,), "size=64k", filled=0),
    Place("a disk with room for a part", (1,), "size=64k", filled=4096),
    Place("a disk with room", (0,), "size=1m"),
    Place("a disk without inodes", (1,), "size=1m,nr_inodes=1"),
    Place("a limit of file sizes", (1,), before=FILE_LIMIT.format(4096)),
    Place("a limit of file sizes of 0", (1,), before=FILE_LIMIT.format(0)),
    Place("a quota", (1,), "size=1m,usrquota,usrquota_block_hardlimit=4k,mode=777", WITHOUT_RIGHTS),
    Place("a disk that is read only", (2,), "ro"),
    Place("a folder of another user", (2,), "mode=555", WITHOUT_RIGHTS),
    Place("no HOME", drop=("HOME",)),
    Place("a HOME that is not there", variables={"HOME": "/nonexistent/home"}),
    Place("a HOME that is a file", variables={"HOME": "/dev/null"}),
    Place("no TMPDIR", drop=("TMPDIR", "TEMP", "TMP")),
    Place("a TMPDIR that is not there", variables={"TMPDIR": "/nonexistent/tmp"}),
    Place("LANG=C", variables=PLAIN),
    Place(
        "LANG=C and names of another script",
        variables=PLAIN,
        prompt="ein roter Kreis 赤い円",
        output="円 [red].png",
    ),
    Place("no environment", drop=tuple(sorted({"HOME", "PATH", "LANG", "USER", "TERM", "SHELL", "LOGNAME"}))),
    Place("a dumb terminal", variables={"TERM": "dumb", "NO_COLOR": "1"}),
    Place("forced colours", variables={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}),
    Place("no standard input", closed=(0,)),
    Place("no standard output", closed=(1,)),
    Place("no standard error", closed=(2,)),
    Place("no standard anything", closed=(0, 1, 2)),
]
"""Those of the share of ``make test`` are every third."""


@contextlib.contextmanager
def made(place: Place, folder: Path) -> Iterator[Path]:
    """The folder of the output."""
    folder.mkdir(parents=True)
    if place.mount is None:
        yield folder
        return
    words = ["mount", "-t", "tmpfs", "-o", place.mount, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        raise NotHere(place.name)  # the limits of file sizes are left
    try:
        if place.filled is not None:
            _fill(folder, place.filled)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(folder: Path, left: int) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with (folder / "filler").open("rb+") as file:
        size = (folder / "filler").stat().st_size - left
        file.truncate(max(0, size))


def _ran(script: str, words: list[object], place: Place, here: Path) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in place.drop}
    closing = " ".join(f"{number}>&-" for number in place.closed)
    return subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$@" {closing}',
            "sh",
            sys.executable,
            "-c",
            place.before + script,
            *map(str, words),
        ],
        env=kept | place.variables,
        cwd=here,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        timeout=SECONDS,
        check=False,
    )


def _draw(
    ground: Ground, place: Place, folder: Path, number: int, json_too: bool, several: bool
) -> Trial | None:
    """Draw one picture or three in a place; None where this machine has no such place."""
    words: list[object] = ["--engine", ground.bundle, "--seed", SEED, "--threads", 1, "--device", "cpu"]
    words += ["--backend", "onnxruntime", *(["--json"] if json_too else [])]
    words += [place.prompt, *(["--num-images", 3, "--batch", 1] if several else [])]
    try:
        with made(place, folder) as output:
            there = {path.name for path in output.iterdir()}
            done = _ran(DRAW, [*words, "--output", output / place.output], place, folder.parent)
            files = {path.name: path.read_bytes() for path in output.iterdir() if path.name not in there}
    except NotHere:
        return None
    except subprocess.TimeoutExpired:
        outcome, said = Outcome.HANG, f"over {SECONDS} s"
    else:
        outcome = _judged(ground, place, done, files, 3 if several else 1, json_too)
        printed = f"{done.stderr[-300:]!r}, {done.stdout[:100]!r}"
        said = f"exit {done.returncode}, {sorted(files)}, {printed}"
    name = f"{place.name}{', --json' if json_too else ''}{', several' if several else ''}"
    return Trial("places", number, outcome, f"{name}: {said}")


def _judged(
    ground: Ground,
    place: Place,
    done: subprocess.CompletedProcess[bytes],
    files: dict[str, bytes],
    asked: int,
    json_too: bool,
) -> Outcome:
    errors = [line for line in done.stderr.splitlines() if line.startswith(b"error: ")]
    told = len(errors) == 1 or 2 in place.closed
    if done.returncode < 0:
        outcome = Outcome.CRASH
    elif b"Traceback" in done.stderr or done.returncode not in place.codes:
        outcome = Outcome.TRACEBACK
    elif not all(_is_whole(data) for data in files.values()):
        outcome = Outcome.HALF
    elif done.returncode:
        outcome = Outcome.REFUSED if told else Outcome.WRONG
    else:
        listed = asked if not json_too or 1 in place.closed else _listed(done.stdout)
        first = files[min(files)] if files else b""
        right = place.prompt != PROMPT or _pixels(first) == _pixels(ground.picture.read_bytes())
        outcome = Outcome.EQUAL if right and len(files) == listed == asked else Outcome.WRONG
    return outcome


def _pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def _is_whole(png: bytes) -> bool:
    try:
        return bool(_pixels(png))
    except (OSError, SyntaxError, ValueError):
        return False


def _listed(stdout: bytes) -> int:
    """How many pictures the output for programs names; 0 if it cannot be read."""
    try:
        return len(json.loads(stdout)["images"])
    except (ValueError, KeyError):
        return 0


def _make(
    ground: Ground, script: str, words: list[object], limit: str, folder: Path, number: int
) -> Trial | None:
    """Export or build on a disk that is too small: that is said, and nothing is changed."""
    place = Place(f"{'build' if script is BUILD else 'export'} on a small disk", (1,), mount=limit)

    def contents(output: Path) -> dict[str, str]:
        files = (p for p in output.rglob("*") if p.is_file() and not p.match(TIMINGS))
        return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    try:
        with made(place, folder) as output:
            if script is BUILD:
                shutil.copytree(ground.bundle, output / "bundle")
            before = contents(output)
            done = _ran(script, [str(word).format(output=output) for word in words], place, folder.parent)
            after = contents(output)
    except NotHere:
        return None
    stderr = done.stderr.decode(errors="replace")
    said = f"{place.name}: exit {done.returncode}: {stderr[-500:]!r}"
    if after != before:
        return Trial("places", number, Outcome.HALF, f"{said}: {sorted(after.keys() ^ before.keys())}")
    one = sum(line.startswith("error: ") for line in stderr.splitlines()) == 1 and "Traceback" not in stderr
    fine = one and done.returncode == 1
    return Trial("places", number, Outcome.REFUSED if fine else Outcome.TRACEBACK, said)


def places(ground: Ground, workers: int, few: bool = False) -> Iterator[Trial]:
    """Every place with and without ``--json``, with one picture and several.

    Args:
        few: a third of the places, pictures only.
    """
    root = ground.bundle.parent / "places"
    root.mkdir()
    jobs: list[Callable[[], Trial | None]] = []

    def add(function: Callable[[Path, int], Trial | None]) -> None:
        number = len(jobs)
        jobs.append(lambda: function(root / str(number), number))

    for position, place in enumerate(PLACES):
        for json_too, several in [(True, True)] if few else [(False, False), (True, False), (True, True)]:
            if not few or position % 3 == 0:
                add(lambda folder, n, p=place, j=json_too, s=several: _draw(ground, p, folder, n, j, s))  # type: ignore[misc]
    if not few:
        export: list[object] = [ground.checkpoint, "--backend", "onnxruntime", "--output", "{output}/out"]
        build: list[object] = ["--engine", "{output}/bundle", "--backend", "tensorrt", "--batch", 1]
        add(lambda folder, n: _make(ground, EXPORT, export, "size=4m", folder, n))
        add(lambda folder, n: _make(ground, BUILD, build, "size=20m", folder, n))
    with ThreadPoolExecutor(workers) as pool:
        yield from (trial for trial in pool.map(lambda job: job(), jobs) if trial is not None)
