"""``python -m hart_runtime.bench.day.cli``: what ``make gpu`` runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from hart_runtime.bench import COMPILED, EAGER
from hart_runtime.bench.cli import RESULTS
from hart_runtime.bench.day import machine
from hart_runtime.bench.day.part import FAILED, MOST_SECONDS, Part, result_of, run_part
from hart_runtime.bench.day.summary import RULES_FILE, write_summary
from hart_runtime.common.console import PATH, command
from hart_runtime.common.errors import InputError, RunError, one_of
from hart_runtime.common.install import clone
from hart_runtime.common.precisions import FP16
from hart_runtime.runtime.backends.names import CUDA, MODULES, ONNXRUNTIME

MACHINE_FILE = "machine.json"
BUNDLE = "bundle"
CONFORMANCE = {ONNXRUNTIME: "onnxruntime-cuda", **{name: name for name in MODULES}}
"""Backends, and what the conformance suite calls them on a GPU."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int
    iterations: int
    warmup: int
    suite: tuple[str, ...] = ()
    """What of the conformance suite, in pytest's words."""


SIZES = {
    "whole": Size(prompts=4, iterations=10, warmup=2),
    "smallest": Size(prompts=1, iterations=2, warmup=1, suite=("-k", "same_run")),
}


@dataclass(frozen=True)
class Given:
    """What was carried to the machine."""

    engine: Path | None = None
    checkpoint: Path | None = None
    reference: Path | None = None


def parts(given: Given, size: Size, folder: Path, torch: bool = True) -> list[Part]:
    """The day, in order.

    Args:
        folder: of the day.
        torch: whether the reference can be timed beside the bundle.
    """
    bundle = given.engine or folder / BUNDLE
    bundle_options = ["--engine", str(bundle), "--device", CUDA]
    source = ["--checkpoint", str(given.checkpoint)] if given.checkpoint else []
    ruler = ["--reference", str(given.reference)] if given.reference else source
    count = [] if given.reference else ["--num-prompts", str(size.prompts)]
    needed = () if given.reference else (machine.EXPORT,)
    rules = [sys.executable, "-m", "tests.cuda_rules", "--output", str(folder / RULES_FILE)]
    day = [Part("rules", rules, (machine.TESTS,))]
    if given.engine is None:
        export = [*_command("export"), *([str(given.checkpoint)] if given.checkpoint else [])]
        export += ["--precision", FP16, "--backend", ONNXRUNTIME, "--output", str(bundle)]
        day.append(Part(BUNDLE, export, (machine.EXPORT,), makes=BUNDLE))
    for name in MODULES:
        build = [*_command("runtime.tensorrt"), "--engine", str(bundle), "--backend", name]
        day.append(Part(f"build-{name}", build, (name,)))
    for name, chosen in CONFORMANCE.items():
        suite = [sys.executable, "-m", "pytest", "-v", "tests/test_conformance.py", *size.suite]
        needs, must = (machine.TESTS, machine.EXPORT, name), {"HART_MUST_OPEN": chosen}
        day.append(Part(f"conformance-{name}", suite, needs, environment=must))
    for name in CONFORMANCE:
        report = f"compare-{name}"
        compare = [*_command("compare"), *bundle_options, "--backend", name, *count, *ruler]
        compare += ["--output", str(folder / report)]
        day.append(Part(report, compare, (machine.COMPARE, *needed, name), makes=report))
    benches = {f"bench-{name}": (name, EAGER if torch else "") for name in CONFORMANCE}
    benches["bench-compiled"] = ONNXRUNTIME, f"{EAGER},{COMPILED}"
    for result, (name, against) in benches.items():
        bench = [*_command("bench"), *bundle_options, "--backend", name, "--output", str(folder / result)]
        bench += ["--iterations", str(size.iterations), "--warmup", str(size.warmup)]
        bench += ["--against", against, *source] if against else []
        compiled = (machine.TORCH,) if COMPILED in against else ()
        day.append(Part(result, bench, (machine.BENCH, name, *compiled), makes=result))
    day.append(Part("host", [sys.executable, "-m", "hart_runtime.bench.host"]))
    return day


def _command(room: str) -> list[str]:
    """What runs a room's command with this interpreter, installed or not."""
    return [sys.executable, "-c", f"from hart_runtime.{room}.cli import main; main()"]


def ask_the_machine() -> dict[str, Any]:
    """What :mod:`hart_runtime.bench.day.machine` says, in a process of its own.

    Raises:
        RunError: the process failed.
    """
    question = [sys.executable, "-m", "hart_runtime.bench.day.machine"]
    done = subprocess.run(question, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"this machine could not be described: {last}")
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


@command()
@click.option("--engine", type=PATH, metavar="BUNDLE", help="A float16 bundle that was carried here.")
@click.option("--checkpoint", type=PATH, help="What it was exported from, or is to be. [default: the demo's]")
@click.option("--reference", type=PATH, help="A saved reference, for a machine without torch.")
@click.option("--size", default="whole", show_default=True, type=click.Choice([*SIZES]))
@click.option("--only", multiple=True, metavar="PART", help="Only this part; can be given several times.")
@click.option("--output", type=PATH, help=f"Folder, to go on where it ends. [default: {RESULTS}/DATE-GPU]")
def main(
    engine: Path | None,
    checkpoint: Path | None,
    reference: Path | None,
    size: str,
    only: tuple[str, ...],
    output: Path | None,
) -> None:
    """Find out all about the GPU of this machine, part by part, and write a summary.

    A part that passed is not run again, and a part that fails stops no other. Exit code 0: none
    failed, 1: some did, 2: there is no GPU.
    """
    paths = [path.absolute() if path else None for path in (engine, checkpoint, reference)]
    given, folder = Given(*paths), (output or RESULTS).absolute()
    names = [part.name for part in parts(given, SIZES[size], folder)]
    for name in only:
        one_of("only", name, names)
    found = ask_the_machine()
    if found["gpu"] is None:
        reason = found["why"].partition(";")[0]
        raise InputError(
            f"{reason}: nothing was run; on a machine with one this runs {', '.join(names)}, each in "
            f"at most {MOST_SECONDS // 60} minutes, and writes {output or RESULTS / 'DATE-GPU'}/summary.md"
        )
    if output is None:
        slug = re.sub(r"\W+", "-", found["gpu"]["name"]).strip("-").lower()
        folder /= f"{datetime.now(timezone.utc):%Y%m%d}-{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / MACHINE_FILE).write_text(text, encoding="utf-8")
    day = parts(given, SIZES[size], folder, torch=machine.TORCH not in found["lacks"])
    outcomes = []
    for part in day:
        if only and part.name not in only and not result_of(part, folder).exists():
            continue
        click.echo(f"{part.name}: ", nl=False)
        outcomes.append(run_part(part, folder, found["lacks"], clone() or Path.cwd()))
        outcome = outcomes[-1]
        click.echo(f"{outcome.verdict}, {outcome.seconds:.0f} s: {outcome.said}")
        write_summary(folder, found, outcomes)
    click.echo(folder / "summary.md")
    if failed := [outcome.name for outcome in outcomes if outcome.verdict == FAILED]:
        raise RunError(f"{len(failed)} of {len(outcomes)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
