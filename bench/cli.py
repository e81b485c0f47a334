"""``hart-bench``: how fast a bundle is, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hart_runtime.bench import REFERENCES
from hart_runtime.bench.load_cli import serve_load
from hart_runtime.bench.scale_check import scale_check
from hart_runtime.bench.scale_cli import scale
from hart_runtime.common.console import PATH, WORD, command, group
from hart_runtime.common.errors import InputError, one_of, shown
from hart_runtime.common.files import refuse_existing, whole_folder
from hart_runtime.common.install import require
from hart_runtime.runtime.options import (
    BUNDLE_HELP,
    backend_option,
    device_option,
    size_option,
    threads_option,
)

if TYPE_CHECKING:
    from hart_runtime.bench.compare import Change

Made = TypeVar("Made")


class Duration(click.types.StringParamType):
    """Seconds, as a number with its unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Seconds; a default is some already."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", str(value).strip())
        seconds = float(found[1]) * 60 ** "smh".index(found[2]) if found else 0.0
        if not 0 < seconds <= MOST_SECONDS:
            self.fail(
                f"expected a time such as 10m, 90s or 1h, of a day at most, found {shown(value)}", param, ctx
            )
        return seconds


DURATION, MOST_SECONDS = Duration(), 24 * 3600.0
FILE_WIDTH = 120
"""Columns of the tables where no terminal says how wide it is."""
RESULTS = Path("benchmarks/results")


@group(
    words={"batches": "--batch"},
    invoke_without_command=True,
    subcommand_metavar="[compare A.json B.json | serve --url URL | serve --engine BUNDLE]",
)
@click.option("--engine", "bundle", type=PATH, metavar="BUNDLE", help=BUNDLE_HELP)
@device_option
@backend_option
@size_option
@click.option(
    "--batch", default="1", show_default=True, help="Batch sizes: 1,4,8. Stages are timed at the first."
)
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--warmup", type=click.IntRange(1), default=3, show_default=True, help="GPUs replay from the third on."
)
@threads_option
@click.option("--against", type=WORD, help=f"References to run in turns: {','.join(REFERENCES)}.")
@click.option("--checkpoint", type=PATH, help="What the bundle was exported from, for --against.")
@click.option(
    "--sustained",
    type=DURATION,
    help="Draw for so long without a pause, such as 10m, 90s or 1h, and tell of each minute.",
)
@click.option("--output", type=PATH, help=f"Result folder. [default: {RESULTS}/BUNDLE-DEVICE-DATE]")
@click.pass_context
def main(
    context: click.Context,
    bundle: Path | None,
    device: str,
    backend: str,
    size: int | None,
    batch: str,
    iterations: int,
    warmup: int,
    threads: int | None,
    against: str | None,
    checkpoint: Path | None,
    sustained: float | None,
    output: Path | None,
) -> None:
    """Measure the bundle in BUNDLE: latency, throughput, memory, and the time of every stage."""
    if context.invoked_subcommand:
        return
    if bundle is None:
        raise InputError("`bundle`: expected a bundle folder, found nothing; hart-bench --help shows more")
    if checkpoint is not None and not against:
        raise InputError("`checkpoint`: is what `against` runs, found none of it")
    if output:
        refuse_existing(output)
    require("hart-bench", "bench", "psutil", "pynvml", "matplotlib", "onnx")
    if sustained is not None:
        if size is not None:
            raise InputError("`sustained`: draws the bundle's first size, found `size` beside it")
        if against:
            raise InputError("`sustained`: draws with the bundle alone, found `against` beside it")
        _sustain(bundle, sustained, device, backend, batch, threads, output)
        return
    from rich.console import Console

    from hart_runtime.bench.measure import Task, measure
    from hart_runtime.bench.plots import write_plots
    from hart_runtime.bench.report import print_report, write_markdown
    from hart_runtime.bench.result import write_result

    names = tuple(dict.fromkeys(name for name in (against or "").split(",") if name))
    for name in names:
        one_of("against", name, REFERENCES)
    batches = _sizes(batch)
    plan = Task(bundle, device, backend, batches, iterations, warmup, threads, names, checkpoint, size)
    result = _with_progress(lambda told: measure(plan, told))
    target = output or _place(result.bundle["name"], result.device)
    with whole_folder(target) as folder:
        write_result(result, folder)
        plots = write_plots(result, folder)
        write_markdown(result, folder / "bench.md", plots)
    console = Console()
    print_report(result, console if console.is_terminal else Console(width=FILE_WIDTH))
    click.echo(target)


@command(name="compare")
@click.argument("before", metavar="A.json", type=PATH)
@click.argument("after", metavar="B.json", type=PATH)
@click.option("--all", "everything", is_flag=True, help="Also what did not change beyond the noise.")
def compare_results(before: Path, after: Path, everything: bool) -> None:
    """Print what changed from A.json to B.json beyond the noise of their samples."""
    require("hart-bench", "bench", "psutil")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hart_runtime.bench.compare import LEAST_SAMPLES, compare, different_conditions
    from hart_runtime.bench.result import read_result

    first, second = read_result(before), read_result(after)
    changes = compare(first, second)
    for sentence in different_conditions(first, second):
        click.echo(f"note: {sentence}")
    shown = [change for change in changes if everything or not (change.noise or change.few)]
    table = Table("what", *(("A", "B", "change")))
    for change in shown:
        note = " (too few samples)" if change.few else " (noise)" if change.noise else ""
        table.add_row(Text(change.name), *_values(change), f"{change.relative:+.1%}{note}")
    if shown:
        Console().print(table)
    judged = [change for change in changes if not change.few]
    told = f"{sum(not change.noise for change in judged)} of {len(judged)} quantities changed"
    if few := len(changes) - len(judged):
        told += (
            f"; {few} could not be judged, of fewer than {LEAST_SAMPLES} samples: measure with "
            f"--iterations {LEAST_SAMPLES} or more"
        )
    click.echo(told)


main.add_command(compare_results)
main.add_command(scale)
main.add_command(scale_check)
main.add_command(serve_load)


def _values(change: Change) -> tuple[str, str]:
    forms = {"seconds": (1e3, "{:.2f} ms"), "bytes": (1e-6, "{:.1f} MB"), "ratio": (1.0, "{:.2f}")}
    factor, form = forms[change.unit]
    return form.format(change.before * factor), form.format(change.after * factor)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"`batches`: expected numbers such as 1,4,8, found {text!r}") from None


def _place(name: str, device: str) -> Path:
    """Where a result goes that nobody named a place for; the bundle's name is somebody else's word."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    plain = re.sub(r"[^\w.-]+", "_", name).lstrip(".")
    return RESULTS / f"{plain}-{device}-{stamp}"


def _with_progress(work: Callable[[Callable[[str], None]], Made]) -> Made:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return work(lambda _: None)
    with console.status("starting") as status:
        return work(status.update)


def _sustain(
    bundle: Path,
    seconds: float,
    device: str,
    backend: str,
    batch: str,
    threads: int | None,
    output: Path | None,
) -> None:
    """Draw for minutes, and print a line for each."""
    from rich.console import Console

    from hart_runtime.bench.plots import plot_sustained
    from hart_runtime.bench.report import sustained_table
    from hart_runtime.bench.sustained import sustain, write_sustained

    sizes = _sizes(batch)
    if len(sizes) != 1:
        raise InputError(f"`batches`: expected one number beside `sustained`, found {batch}")
    found = _with_progress(lambda told: sustain(bundle, seconds, device, backend, sizes[0], threads, told))
    target = output or _place(found.bundle["name"], found.device)
    with whole_folder(target) as folder:
        write_sustained(found, folder)
        plot_sustained(found, folder)
    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(sustained_table(found))
    if warning := found.company.warning():
        click.echo(f"warning: {warning}", err=True)
    click.echo(target)
