"""The kill campaign: exports, builds and runs that are killed at the n-th file event.

After each there is the old state or the new one, never a half; what a killed run left is found and removed by
a later one, which says so; and of two exports to one folder one wins.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hart_runtime.common.errors import InputError
from hart_runtime.common.files import LEFT
from hart_runtime.common.hashing import sha256_of_pieces
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.tensorrt.manifest import ENGINE_MANIFEST, engine_file, read_engine_manifest
from tests.torture.outcomes import Outcome, Trial
from tests.torture.subjects import PROMPT, Ground
from tests.torture.workers import FORK

SECONDS = 300.0
OLD, NEW = "old", "new"
PROMPTS = [PROMPT, "a small blue star on a yellow background", "a green square", "a black cross"]
CHANGING = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)


class Ended(NamedTuple):
    """A process that ended."""

    code: int | None
    """Negative for a signal; None where it had to be stopped."""
    said: str
    events: int


def _count_events(below: Path, kill_at: int | None, counter: Path) -> None:
    """Count what changes files below a folder, from now on, and end this process before the n-th."""
    count = 0
    descriptor = os.open(counter, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    prefix = str(below)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGING:
            path = arguments[0]
        else:
            return
        named = isinstance(path, str | bytes | os.PathLike)
        if not named or (Path(os.fsdecode(path)).is_absolute() and not os.fsdecode(path).startswith(prefix)):
            return
        count += 1
        os.pwrite(descriptor, str(count).encode(), 0)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def begin(act: Callable[[Path], None], folder: Path, kill_at: int | None = None) -> Callable[[], Ended]:
    """Do something to a folder in a forked process; what is returned waits for it."""
    name = hashlib.sha256(os.urandom(8)).hexdigest()[:8]
    log, counter = (folder.with_name(f"{folder.name}-{name}.{kind}") for kind in ("log", "events"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            _count_events(folder, kill_at, counter)
            act(folder)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS

    def wait() -> Ended:
        while time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code: int | None = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.01)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = None
        said, events = (file.read_text(errors="replace") if file.exists() else "" for file in (log, counter))
        log.unlink(missing_ok=True)
        counter.unlink(missing_ok=True)
        return Ended(code, said, int(events or 0))

    return wait


@dataclass(frozen=True)
class Target:
    """What is done to a folder and killed."""

    name: str
    prepare: Callable[[Path], None]
    """Bring a folder into the old state, whatever it holds; leftovers stay."""
    act: Callable[[Path], None]
    state: Callable[[Path], str]
    """Old, new, or in words what is half."""


def leftovers(folder: Path) -> set[str]:
    """Everything that is hidden: nothing that is asked for is."""
    parts = [path.relative_to(folder).parts for path in folder.rglob(".*")]
    return {str(Path(*path)) for path in parts if not any(part.startswith(".") for part in path[:-1])}


def chain(target: Target, folder: Path, kills: int, seed: int) -> list[Trial]:
    """Kill one run after the other in the same folder; the last may end."""
    campaign, rng, done = f"kills: {target.name}", random.Random(f"{seed}:{folder.name}"), []
    folder.mkdir(parents=True)
    target.prepare(folder)
    whole = begin(target.act, folder)()
    if whole.code != 0 or target.state(folder) != NEW or leftovers(folder):
        raise RuntimeError(f"{target.name}: {whole}, {target.state(folder)}, {leftovers(folder)}")
    target.prepare(folder)
    for number in range(kills + 1):
        before = leftovers(folder)
        last = number == kills
        at = None if last else 1 + (number * whole.events + rng.randrange(whole.events)) // kills
        ended = begin(target.act, folder, at)()
        state, after = target.state(folder), leftovers(folder)
        said = f"at event {at} of {whole.events}: {state}"
        silent = [name for name in before - after if Path(name).name not in ended.said.replace("\n", "")]
        if ended.code is None:
            outcome = Outcome.HANG
        elif "Traceback" in ended.said or ended.code not in (0, -signal.SIGKILL):
            outcome, said = Outcome.TRACEBACK, f"{said}: {ended.code}: {ended.said[-500:]}"
        elif state not in (OLD, NEW):
            outcome = Outcome.HALF
        elif silent:
            outcome, said = Outcome.WRONG, f"{said}: removed {silent} without a word: {ended.said!r}"
        elif ended.code == 0 and (after or state != NEW):
            outcome, said = Outcome.HALF, f"{said}: still there: {sorted(after)}"
        else:
            outcome = Outcome.EQUAL if state == OLD else Outcome.EFFECT
        done.append(Trial(campaign, number, outcome, said))
        if state == NEW or outcome is Outcome.HALF:
            target.prepare(folder)
    return done


def at_once(target: Target, folder: Path) -> list[Trial]:
    """Two at once: one wins, the other says so."""
    folder.mkdir(parents=True)
    target.prepare(folder)
    first, second = [wait() for wait in (begin(target.act, folder), begin(target.act, folder))]
    codes = sorted(-1 if ended.code is None else ended.code for ended in (first, second))
    lost = first if first.code else second
    told = (
        sum(line.startswith("error: ") for line in lost.said.splitlines()) == 1
        and "exists already" in lost.said
    )
    said = f"{codes}, {target.state(folder)}, left {leftovers(folder)}, {lost.said[-300:]!r}"
    fine = codes == [0, 2] and told and target.state(folder) == NEW and not leftovers(folder)
    return [Trial("kills: two at once", 0, Outcome.EFFECT if fine else Outcome.HALF, said)]


def _command(main: Any, *words: object) -> None:
    main([str(word) for word in words])


def _run(ground: Ground, seed: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        from hart_runtime.runtime.cli import main

        prompts = folder.with_suffix(".txt")
        prompts.write_text("\n".join(PROMPTS))
        words = ("--engine", ground.bundle, "--prompts-file", prompts, "--threads", 1, "--seed", seed)
        _command(main, *words, "--batch", 1, "--backend", "onnxruntime", "--output", folder / "out.png")

    return act


def runs(ground: Ground, over: bool) -> Target:
    """A file of prompts, drawn into a folder, over other pictures or not."""
    known: dict[str, dict[str, str]] = {}

    def contents(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("[!.]*")}

    def prepare(folder: Path) -> None:
        for path in folder.glob("[!.]*"):
            path.unlink()
        if over and OLD not in known:
            begin(_run(ground, 1), folder)()
            shutil.copytree(folder, folder.with_name(f"{folder.name}-old"))
        if over:
            shutil.copytree(folder.with_name(f"{folder.name}-old"), folder, dirs_exist_ok=True)
        known.setdefault(OLD, contents(folder))

    def state(folder: Path) -> str:
        found = contents(folder)
        if NEW not in known:
            known[NEW] = found if len(found) == len(PROMPTS) else {}
        old, new = known[OLD], known[NEW]
        if wrong := [n for n in {*found, *old} if found.get(n) not in (old.get(n), new.get(n, "never"))]:
            return f"half: {sorted(wrong)}"
        return NEW if found == new else OLD

    return Target("run", prepare, _run(ground, 2), state)


def exports(ground: Ground, over: bool) -> Target:
    """A bundle, in place of another or not."""

    def prepare(folder: Path) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if over:
            shutil.copytree(ground.bundle, folder / "out")

    def act(folder: Path) -> None:
        import torch

        from hart_runtime.export.cli import main

        torch.set_num_threads(1)
        words = (ground.checkpoint, "--backend", "onnxruntime", "--precision", "fp32", "--max-batch", 3)
        _command(main, *words, "--output", folder / "out", *(["--force"] if over else []))

    def state(folder: Path) -> str:
        output = folder / "out"
        if not output.exists():
            return "nothing in the place of a bundle" if over else OLD
        try:
            manifest = open_bundle(output).manifest
        except InputError as error:
            return f"half: {error}"
        if {p.name for p in output.iterdir()} != {MANIFEST, *manifest.files}:
            return f"half: {sorted(p.name for p in output.iterdir())}"
        return NEW if manifest.max_batch == 3 else OLD

    return Target(f"export{' --force' if over else ''}", prepare, act, state)


def builds(ground: Ground, package: str) -> Target:
    """Engines of a bundle."""

    def prepare(folder: Path) -> None:
        bundle = folder / "bundle"
        if not bundle.exists():
            shutil.copytree(ground.bundle, bundle)
        for file in bundle.glob(f"*/{ENGINE_MANIFEST}"):
            shutil.rmtree(file.parent)

    def act(folder: Path) -> None:
        from hart_runtime.runtime.tensorrt.cli import main
        from tests.torture.ground import on_a_strict_machine

        capability = ["--compute-capability", "8.6"]
        if package == "tensorrt":
            on_a_strict_machine()
            capability = []
        _command(main, "--engine", folder / "bundle", "--backend", package, "--batch", 1, *capability)

    def state(folder: Path) -> str:
        bundle = folder / "bundle"
        try:
            names = set(open_bundle(bundle).manifest.engined)
            folders = [p for p in bundle.iterdir() if p.is_dir() and not LEFT.fullmatch(p.name)]
            for engines in folders:
                found = read_engine_manifest(engines)
                for name, engine in found.engines.items():
                    if sha256_of_pieces(engines / engine_file(name)) != engine.file.sha256:
                        return f"half: {name}"
                if set(found.engines) != names or len(list(engines.iterdir())) != len(names) + 1:
                    return f"half: {sorted(found.engines)}"
        except (InputError, OSError) as error:
            return f"half: {error}"
        return NEW if folders else OLD

    return Target(f"build {package}", prepare, act, state)


def has_rtx() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorrt_rtx") is not None


Chain = tuple[Target, int]


def everything(ground: Ground, kills: int, quick: bool) -> list[Chain]:
    """How ``kills`` are spread; ``quick`` is without exports and real builds."""
    if quick:
        return [(builds(ground, "tensorrt"), kills // 3), (runs(ground, over=True), kills - kills // 3)]
    part = kills // 10
    builder = "tensorrt-rtx" if has_rtx() else "tensorrt"
    return [
        (exports(ground, over=False), part),
        (exports(ground, over=True), part),
        (builds(ground, builder), 2 * part),
        (builds(ground, "tensorrt"), part),
        (runs(ground, over=False), 2 * part),
        (runs(ground, over=True), kills - 7 * part),
    ]


def kill(ground: Ground, chains: Sequence[Chain], seed: int, workers: int, pair: bool) -> Iterator[Trial]:
    """All chains, each in a process of its own that has torch loaded, and two exports at once."""
    import torch
    import torch.onnx  # noqa: F401

    place = ground.bundle.parent / "kills"
    jobs: list[Callable[[], list[Trial]]] = [
        _bound(target, place / f"{number}", count, seed) for number, (target, count) in enumerate(chains)
    ]
    if pair:
        jobs.append(lambda: at_once(exports(ground, over=False), place / "pair"))
    with ProcessPoolExecutor(workers, FORK, initializer=_known, initargs=(jobs,)) as pool:
        for trials in pool.map(_job, range(len(jobs))):
            yield from trials


def _bound(target: Target, folder: Path, kills: int, seed: int) -> Callable[[], list[Trial]]:
    return lambda: chain(target, folder, kills, seed)


_JOBS: list[Callable[[], list[Trial]]] = []


def _known(jobs: list[Callable[[], list[Trial]]]) -> None:
    """In a worker: functions are inherited by the fork, and need not be sent."""
    _JOBS[:] = jobs


def _job(number: int) -> list[Trial]:
    return _JOBS[number]()
