"""The whole way of a published checkpoint, with random numbers in its place.

``python -m hart_runtime.compare.rehearsal --folder DIR`` writes a random checkpoint of the full
published shape, exports it in its precisions, draws one picture and compares it with the
reference, and builds engines. Every step is a process of its own, whose time and peak memory are
printed. Steps that are done already (their folder is there) are not done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

import hart_runtime
from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import RunError, one_of
from hart_runtime.hart.random_checkpoint import TEXT_ENCODERS, is_var, read_shape
from hart_runtime.runtime.backends.names import ONNXRUNTIME

SHAPE = "hart-0.7b-1024px"
SEED = 0
NO_SYSTEM_PROMPT = "none"
"""The published one needs a network, and random weights need none."""
CHECKPOINT, CAPTURED = "checkpoint", "captured"
"""Folders of the rehearsal that its steps share."""
CACHE = "cache"
"""In what was captured: keys and values of the last scale, ``key_0.npy`` and so on."""
LARGEST = 16
"""Side of the largest scale that is compared as a whole; later ones graph by graph."""
CAPABILITIES = "8.6,8.9,12.0"
EXPORT_PEAK = 1.6
"""Most memory of a float32 export, in units of its weights."""
EXPORT_SECONDS = 600
"""Most seconds of a float16 export."""
DRAWING_EXTRA = 3e9
"""Most memory of drawing one picture in float32, beside weights and KV cache."""


@dataclass(frozen=True)
class Usage:
    """What one process took."""

    seconds: float
    cpu_seconds: float
    peak: int
    """Most resident memory, in bytes; mapped files count where they were read."""


@dataclass(frozen=True)
class Step:
    """One process of the rehearsal."""

    name: str
    command: list[str]
    makes: str | None = None
    """A folder or file; if it is there, the step is done."""
    check: Callable[[Path, Usage], tuple[str, bool]] | None = None
    """Says in words what was asked for, and whether it is so."""


def steps(shape: str, text_encoder: str, largest: int) -> list[Step]:
    """The rehearsal of HART, in order; file names are relative to its folder."""
    random = [*_random(shape), "--published", "--text-encoder", text_encoder]
    options = ["--system-prompt", NO_SYSTEM_PROMPT]
    own = _own(largest)
    return [
        Step("checkpoint", random, CHECKPOINT),
        Step("export fp32", _export("fp32", *options), "fp32", _little_memory),
        Step("export fp16", _export("fp16", *options), "fp16", _in_time),
        Step("open fp32", [*own, "open", "fp32"]),
        Step("open fp16", [*own, "open", "fp16"]),
        Step("draw fp32", [*own, "draw", "fp32"], CAPTURED, _little_extra),
        Step("small scales: export", [*own, "export-prefix", "prefix"], "prefix"),
        Step("small scales: compare", _compare("prefix")),
        Step("large scales: compare", [*own, "compare", "fp32"]),
        Step("engines", _build("fp16")),
    ]


def class_steps(shape: str) -> list[Step]:
    """That of VAR, whose weights belong to all of their scales: these are compared as a whole."""
    own = _own(LARGEST)
    return [
        Step("checkpoint", _random(shape), CHECKPOINT),
        Step("export fp32", _export("fp32"), "fp32", _little_memory),
        Step("export fp16", _export("fp16"), "fp16", _in_time),
        Step("export int8", _export("int8"), "int8", _in_time),
        Step("open fp32", [*own, "open", "fp32"]),
        Step("draw fp32", [*own, "draw", "fp32"], CAPTURED, _little_extra),
        Step("draw int8", [*own, "draw", "int8", "--output", "drawn-int8"], "drawn-int8"),
        Step("compare", _compare("fp32")),
        Step("engines", _build("fp16")),
    ]


def _random(shape: str) -> list[str]:
    module = [sys.executable, "-m", "hart_runtime.hart.random_checkpoint"]
    return [*module, "--output", CHECKPOINT, "--shape", shape]


def _own(largest: int) -> list[str]:
    return [sys.executable, "-m", "hart_runtime.compare.rehearsal_steps", "--largest", str(largest)]


def _export(precision: str, *options: str) -> list[str]:
    given = [CHECKPOINT, "--backend", ONNXRUNTIME, "--precision", precision, "--output", precision]
    return [*_command("export"), *given, *options]


def _compare(bundle: str) -> list[str]:
    given = ["--checkpoint", CHECKPOINT, "--engine", bundle, "--device", "cpu", "--num-prompts", "1"]
    return [*_command("compare"), *given, "--output", "report"]


def _build(bundle: str) -> list[str]:
    given = ["--backend", "tensorrt-rtx", "--engine", bundle, "--compute-capability", CAPABILITIES]
    return [*_command("runtime.tensorrt"), *given]


def _command(room: str) -> list[str]:
    """What runs a room's command with this interpreter, installed or not."""
    return [sys.executable, "-c", f"from hart_runtime.{room}.cli import main; main()"]


def run(command: list[str], folder: Path, log: Path) -> Usage:
    """Run a process in a folder, with its output in a file.

    Raises:
        RunError: it failed; holds the last line of its output.
    """
    # The modules that run here run there, whatever folder it is.
    here = str(Path(hart_runtime.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{' '.join(command[1:5])} ended with {process.returncode}: {last}; see {log}")
    return Usage(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def rehearse(folder: Path, todo: list[Step], say: Callable[[str], None]) -> bool:
    """Run every step and say what it took; whether everything that was asked for is so.

    Raises:
        RunError: a step failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fine = True
    for step in todo:
        if step.makes and (folder / step.makes).exists():
            say(f"{step.name}: {step.makes} is there already")
            continue
        log = folder / f"{step.name.replace(' ', '-').replace(':', '')}.log"
        with _removed_if_unfinished(folder, step):
            used = run(step.command, folder, log)
        say(
            f"{step.name}: {used.seconds:.0f} s ({used.cpu_seconds:.0f} s of CPU time), "
            f"{used.peak / 1e9:.2f} GB at the most"
        )
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            say(f"    {line}")
        if step.check:
            words, ok = step.check(folder, used)
            say(f"    {words}: {'yes' if ok else 'NO'}")
            fine &= ok
    return fine


@contextlib.contextmanager
def _removed_if_unfinished(folder: Path, step: Step) -> Iterator[None]:
    """A capture that stopped half way is not taken for a whole one."""
    try:
        yield
    except BaseException:
        if step.makes:
            import shutil

            shutil.rmtree(folder / step.makes, ignore_errors=True)
        raise


def _weights(bundle: Path) -> int:
    return (bundle / "weights.bin").stat().st_size


def _little_memory(folder: Path, used: Usage) -> tuple[str, bool]:
    share = used.peak / _weights(folder / "fp32")
    return f"{share:.2f} times the weights, asked for at most {EXPORT_PEAK}", share <= EXPORT_PEAK


def _in_time(folder: Path, used: Usage) -> tuple[str, bool]:
    return f"{used.seconds:.0f} s, asked for less than {EXPORT_SECONDS}", used.seconds < EXPORT_SECONDS


def _little_extra(folder: Path, used: Usage) -> tuple[str, bool]:
    described = json.loads((folder / CAPTURED / "drawing.json").read_text(encoding="utf-8"))
    needed = _weights(folder / "fp32") + described["cache_bytes"]
    return (
        f"weights and KV cache are {needed / 1e9:.2f} GB, asked for at most {DRAWING_EXTRA / 1e9:g} more",
        used.peak <= needed + DRAWING_EXTRA,
    )


@command()
@click.option("--folder", required=True, type=PATH, help="Where everything is written.")
@click.option(
    "--shape",
    default=SHAPE,
    show_default=True,
    metavar="NAME|FILE",
    help="Shape of the model, HART's or VAR's.",
)
@click.option("--text-encoder", default="qwen2-1.5b", show_default=True, help="Or small; VAR has none.")
@click.option(
    "--largest",
    type=click.IntRange(1),
    default=LARGEST,
    show_default=True,
    help="Largest scale taken whole.",
)
@click.option("--only", multiple=True, metavar="STEP", help="Only this step; can be given several times.")
def main(folder: Path, shape: str, text_encoder: str, largest: int, only: tuple[str, ...]) -> None:
    """Rehearse export, drawing, comparison and engines with random weights of a published shape."""
    one_of("text_encoder", text_encoder, TEXT_ENCODERS)
    classes = is_var(shape)
    if not classes:
        read_shape(shape)
    if Path(shape).is_file():
        shape = str(Path(shape).absolute())  # the steps run in the folder
    chosen = class_steps(shape) if classes else steps(shape, text_encoder, largest)
    known = {step.name: step for step in chosen}
    for name in only:
        one_of("only", name, known)
    todo = [step for name, step in known.items() if not only or name in only]
    if not rehearse(folder, todo, click.echo):
        raise RunError("the rehearsal: not everything that was asked for is so")


if __name__ == "__main__":
    main()
