"""``hart-bench serve``: how a server fares under load."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.console import PATH, WORD, FiniteRange, command
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends.names import AUTO
from hart_runtime.runtime.options import backend_option, device_option, threads_option

if TYPE_CHECKING:
    from hart_runtime.bench.load import Measured
    from hart_runtime.bench.side_by_side import SideBySide

KEY_VARIABLE = "HART_API_KEY"


@command(name="serve")
@click.option("--url", type=WORD, help="Address of a hart-serve that runs.")
@click.option(
    "--engine",
    "bundle",
    type=PATH,
    metavar="BUNDLE",
    help="Or a bundle: a server of its own, in turns with hart-bench's own drawing, its pictures beside "
    "those of hart-run.",
)
@device_option
@backend_option
@threads_option
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1, 1024))
@click.option(
    "--rate", type=FiniteRange(0.01), help="Requests a second, answered or not. [default: each client waits]"
)
@click.option("--seconds", default=30.0, show_default=True, type=FiniteRange(1))
@click.option("--prompt", "prompts", multiple=True, type=WORD, help="In turns. [default: one of the demo's]")
@click.option("--num-images", "pictures", default=1, show_default=True, type=click.IntRange(1, 10))
@click.option("--partial-images", "partials", default=1, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def serve_load(
    url: str | None,
    bundle: Path | None,
    device: str,
    backend: str,
    threads: int | None,
    clients: int,
    rate: float | None,
    seconds: float,
    prompts: tuple[str, ...],
    pictures: int,
    partials: int,
    as_json: bool,
) -> None:
    """Ask a server for pictures, and print throughput, waiting times and refusals.

    Its key is read from $HART_API_KEY. Ends with exit code 1 if pictures are not those of hart-run.
    """
    from hart_runtime.common.install import require

    if (url is None) == (bundle is None):
        raise InputError("expected either `url`, of a server that runs, or `bundle`, to start one with")
    if url is not None and (device, backend, threads) != (AUTO, AUTO, None):
        raise InputError("`device`, `backend`, `threads`: are for `bundle`; a server that runs has its own")
    require("hart-bench serve", "bench", "psutil")
    from hart_runtime.bench.load import OTHER, Load, measure_load
    from hart_runtime.bench.side_by_side import Means, measure_side_by_side
    from hart_runtime.bench.workload import PROMPT

    moments = [number / rate for number in range(int(seconds * rate))] if rate else ()
    load = Load(url or "", clients, moments, seconds, prompts, pictures, partials)
    beside = None
    if bundle is not None:
        require("hart-bench serve", "serve", "fastapi", "uvicorn", "prometheus_client")
        beside = measure_side_by_side(load, Means(bundle, device, backend, threads))
        measured = beside.measured
    else:
        key = os.environ.get(KEY_VARIABLE)
        measured = measure_load(replace(load, prompts=prompts or (PROMPT,), key=key))
    if as_json:
        click.echo(json.dumps((beside or measured).summary(), indent=1))
    else:
        _print(measured, beside)
    if others := measured.outcomes.get(OTHER):
        raise RunError(f"{others} of {len(measured.answers)} answers are not the pictures of hart-run")


def _print(measured: Measured, beside: SideBySide | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from hart_runtime.bench.load import SHARES

    table = Table("seconds until", *(f"p{share}" for share in SHARES))
    for name, words in (("first", "something is shown"), ("whole", "the picture is whole")):
        found = measured.quantiles(name)
        table.add_row(words, *(f"{found[share]:.2f}" if found else "-" for share in SHARES))
    Console().print(table)
    told = ", ".join(f"{name}: {count}" for name, count in sorted(measured.outcomes.items()))
    click.echo(f"{measured.throughput:.2f} pictures a second for {measured.seconds:.0f} s; {told}")
    if beside is None:
        return
    click.echo(
        f"{beside.ratio:.0%} of the {beside.alone_throughput:.2f} of hart-bench in batches of {beside.batch}"
    )
    answers, draws, alone = (
        f"{seconds * 1e3:.2f} ms"
        for seconds in (beside.server_seconds, beside.worker_seconds, beside.alone_seconds)
    )
    click.echo(f"a picture takes {answers} of a processor to answer, {draws} to draw; hart-bench {alone}")
    click.echo(f"health answers in {beside.health.p50 * 1e3:.1f} ms (p99 {beside.health.p99 * 1e3:.1f} ms)")
    rounds = ", ".join(f"{size / 1e6:.0f}" for size in beside.memory)
    click.echo(f"memory after each round: {rounds} MB")
