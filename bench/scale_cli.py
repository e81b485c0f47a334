"""``hart-bench scale``: what a service of more machines would do, from a result of one."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path

import click

from hart_runtime.bench.prediction import Prediction, Row, write_prediction
from hart_runtime.common.bounds import bounds
from hart_runtime.common.console import PATH, FiniteRange, command
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import check_output

MOST_WORKERS = 10_000
WAITING = 64
"""Requests for each worker that may wait, as in hart-serve."""


def _workers(context: click.Context, option: click.Parameter, value: str) -> list[tuple[int, int]]:
    """Numbers, or two with dots between them, and commas between those."""
    try:
        return [bounds(word.strip(), MOST_WORKERS) for word in value.split(",")]
    except InputError as error:
        raise click.BadParameter(str(error)) from None


@command(name="scale", words={"batches": "--batch"})
@click.argument("result", type=PATH)
@click.option(
    "--workers",
    default="1,10,1000",
    show_default=True,
    callback=_workers,
    metavar="N|MIN..MAX,...",
    help="GPUs, or CPUs, that draw; between MIN and MAX as many as Ray Serve's autoscaler wants.",
)
@click.option(
    "--share",
    default=0.8,
    show_default=True,
    type=FiniteRange(0.01, 2),
    help="Requests that come, of those that full batches could draw.",
)
@click.option("--seconds", default=120.0, show_default=True, type=FiniteRange(10), help="That are simulated.")
@click.option("--between-failures", type=FiniteRange(0.01), help="Hours of a worker. [default: none fails]")
@click.option("--price", type=FiniteRange(0), help="Of a worker and hour.")
@click.option(
    "--picture-mb", default=2.0, show_default=True, type=FiniteRange(0.001), help="Size of a picture's file."
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Times that each is simulated, with other chances.",
)
@click.option("--output", type=PATH, help="Write the prediction there, as JSON.")
def scale(
    result: Path,
    workers: list[tuple[int, int]],
    share: float,
    seconds: float,
    between_failures: float | None,
    price: float | None,
    picture_mb: float,
    seeds: int,
    output: Path | None,
) -> None:
    """Predict a service from RESULT, a bench.json that holds several batch sizes, before it is there."""
    from hart_runtime.common.install import require

    require("hart-bench scale", "bench", "simpy")
    from hart_runtime.bench.result import read_result
    from hart_runtime.bench.scale import Service, Times, Told, simulate

    values = read_result(result)
    times = Times({row["batch"]: row["seconds"]["values"] for row in values["latency"]})
    batch = max(times.medians)
    if batch == 1:
        raise InputError(f"{result}: expected several batch sizes, found 1 alone; measure `batches='1,4,8'`")
    if output is not None:
        check_output(output)
    cold = sorted(first["total"] for first in values["first_pictures"])[0]
    rows: list[Row] = []
    for least, most in workers:
        service = Service(
            rate=share * most * batch / times.median(batch),
            workers=least,
            most_workers=most,
            batch=batch,
            room=WAITING,
            seconds=seconds,
            warm_up=seconds / 4,
            cold=cold,
            between_failures=math.inf if between_failures is None else between_failures,
            wanted=batch,
        )
        told = Told.together(simulate(service, times, seed) for seed in range(seeds))
        if not told.waited:
            raise InputError(f"`seconds`: nobody is answered within {seconds:g}; give more")
        pictures, found = told.throughput, told.summary()
        rows.append(
            Row(
                workers=least,
                most_workers=most,
                rate=service.rate,
                batch=batch,
                seconds=service.seconds,
                warm_up=service.warm_up,
                runs=seeds,
                **found,
                network_gbit=pictures * picture_mb * 8e-3,
                storage_tb_a_day=pictures * picture_mb * 0.0864,
                price_of_1000=None if price is None else price * found["mean_workers"] / 3.6 / pictures,
            )
        )
    for row in rows:
        click.echo(sentence(row))
    if output is not None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_prediction(Prediction(str(result), values["date"], now, tuple(rows)), output)


def sentence(row: Row) -> str:
    """A prediction in words."""
    there = f"{row.most_workers} workers"
    if row.most_workers > row.workers:
        there = f"{row.workers} to {there}, {row.mean_workers:.1f} in the mean"
    told = [
        f"{there}, {row.rate:.4g} requests a second",
        f"{row.pictures_per_second:.4g} pictures a second",
        f"p50 {row.p50:.2f} s, p99 {row.p99:.2f} s",
        f"{row.busy:.0%} busy, {row.refused} refused",
        f"{row.network_gbit:.3g} Gbit/s, {row.storage_tb_a_day:.3g} TB a day",
    ]
    if row.price_of_1000 is not None:
        told.append(f"{row.price_of_1000:.3g} for 1000 pictures")
    return "; ".join(told)
