"""``hart-bench scale``: what a service of more machines would do, from a result of one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from hart_runtime.common.console import PATH, FiniteRange, command
from hart_runtime.common.errors import InputError
from hart_runtime.common.files import check_output, whole_file

MOST_WORKERS = 10_000
WAITING = 64
"""Requests for each worker that may wait, as in hart-serve."""


def _workers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    words = [word.strip() for word in value.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) <= MOST_WORKERS for word in words):
        raise click.BadParameter(f"expected numbers up to {MOST_WORKERS} such as 1,10,1000, found {value!r}")
    return [int(word) for word in words]


@command(name="scale", words={"batches": "--batch"})
@click.argument("result", type=PATH)
@click.option(
    "--workers", default="1,10,1000", show_default=True, callback=_workers, help="GPUs, or CPUs, that draw."
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
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=PATH, help="Write the prediction there, as JSON.")
def scale(
    result: Path,
    workers: list[int],
    share: float,
    seconds: float,
    between_failures: float | None,
    price: float | None,
    picture_mb: float,
    seed: int,
    output: Path | None,
) -> None:
    """Predict a service from RESULT, a bench.json that holds several batch sizes, before it is there."""
    from hart_runtime.common.install import require

    require("hart-bench scale", "bench", "simpy")
    from hart_runtime.bench.result import read_result
    from hart_runtime.bench.scale import Service, Times, simulate

    values = read_result(result)
    times = Times({row["batch"]: row["seconds"]["values"] for row in values["latency"]})
    batch = max(times.medians)
    if batch == 1:
        raise InputError(f"{result}: expected several batch sizes, found 1 alone; measure `batches='1,4,8'`")
    if output is not None:
        check_output(output)
    cold = sorted(first["total"] for first in values["first_pictures"])[0]
    rows: list[dict[str, Any]] = []
    for count in workers:
        rate = share * count * batch / times.median(batch)
        service = Service(
            rate=rate,
            workers=count,
            batch=batch,
            room=WAITING * count,
            seconds=seconds,
            warm_up=seconds / 4,
            cold=cold,
            between_failures=math.inf if between_failures is None else between_failures,
        )
        told = simulate(service, times, seed).summary()
        pictures = told["pictures_per_second"]
        told |= {
            "network_gbit": pictures * picture_mb * 8e-3,
            "storage_tb_a_day": pictures * picture_mb * 0.0864,
        }
        if price is not None and pictures:
            told["price_of_1000"] = price * count / 3.6 / pictures
        rows.append({"workers": count, "rate": rate, "batch": batch, **told})
    for row in rows:
        click.echo(sentence(row))
    if output is not None:
        with whole_file(output) as file:
            file.write((json.dumps({"result": str(result), "rows": rows}, indent=1) + "\n").encode())


def sentence(row: dict[str, Any]) -> str:
    """A prediction in words."""
    told = [
        f"{row['workers']} workers, {row['rate']:.4g} requests a second",
        f"{row['pictures_per_second']:.4g} pictures a second",
        f"p50 {row['p50']:.2f} s, p99 {row['p99']:.2f} s",
        f"{row['busy']:.0%} busy, {row['refused']} refused",
        f"{row['network_gbit']:.3g} Gbit/s, {row['storage_tb_a_day']:.3g} TB a day",
    ]
    if "price_of_1000" in row:
        told.append(f"{row['price_of_1000']:.3g} for 1000 pictures")
    return "; ".join(told)
