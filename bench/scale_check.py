"""``hart-bench scale-check``: a service that runs, beside what was predicted of it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.bench.load_cli import KEY_VARIABLE
from hart_runtime.bench.prediction import Row, read_prediction
from hart_runtime.common.console import PATH, WORD, command
from hart_runtime.common.errors import InputError, RunError

if TYPE_CHECKING:
    from hart_runtime.bench.load import Load, Measured
    from hart_runtime.bench.scale import Service, Told

ALLOWED = {"pictures_per_second": 0.15, "p50": 0.15, "p99": 0.30}
"""How far a measurement may be from its prediction, as a share of it."""
LISTEN = 10.0
"""Seconds before and after the measurement in which others are watched: in between the service works, too."""
MOST_CLIENTS = 1000
"""That wait at the same time."""


@command(name="scale-check", words={"workers": "--workers"})
@click.argument("prediction", type=PATH)
@click.option("--url", required=True, type=WORD, help="Address of the service.")
def scale_check(prediction: Path, url: str) -> None:
    """Ask a service at the moments that PREDICTION was made for, and compare.

    PREDICTION is the --output of hart-bench scale, of one number of workers, which the service has to have.
    Its key is read from $HART_API_KEY. Ends with exit code 1 if throughput, p50 or p99 are further from the
    prediction than 15, 15 and 30 %.
    """
    from hart_runtime.common.install import require

    require("hart-bench scale-check", "bench", "psutil", "simpy")
    from hart_runtime.bench.load import measure_load
    from hart_runtime.bench.machine import watch_company
    from hart_runtime.bench.scale import Service, Told

    predicted = read_prediction(prediction)
    if len(predicted.rows) != 1 or predicted.rows[0].most_workers > predicted.rows[0].workers:
        raise InputError(f"{prediction}: expected a prediction of one number of workers; predict `workers=2`")
    (row,) = predicted.rows
    service = Service(row.rate, row.workers, seconds=row.seconds, warm_up=row.warm_up)
    click.echo(f"predicted {predicted.date} from {predicted.result}, measured {predicted.measured}")
    with watch_company() as before:
        time.sleep(LISTEN)
    rounds: list[Measured] = []
    with watch_company() as meanwhile:
        for seed in range(row.runs):
            rounds.append(measure_load(load_of(row, url, seed)))
    with watch_company() as after:
        time.sleep(LISTEN)
    measured = Told.together(told_of(service, one) for one in rounds)
    outcomes = sum((Counter(one.outcomes) for one in rounds), Counter[str]())
    told = ", ".join(f"{name}: {count}" for name, count in sorted(outcomes.items()))
    click.echo(f"{told}; after the warm-up {measured.refused} refused, predicted {row.refused}")
    click.echo(
        f"of {before.cores} cores busy: {before.cores_used:.1f} before, {meanwhile.cores_used:.1f} meanwhile "
        f"(drawing: {row.busy * row.workers:.1f} for each of its threads), {after.cores_used:.1f} after"
    )
    _judge(row, measured.summary(), outcomes)


def load_of(row: Row, url: str, seed: int) -> Load:
    """Requests of one run, at the moments that it was simulated with; no two prompts are alike."""
    from hart_runtime.bench.load import Load
    from hart_runtime.bench.scale import arrivals
    from hart_runtime.bench.workload import PROMPT

    moments = list(takewhile(lambda moment: moment < row.seconds, arrivals(row.rate, seed)))
    return Load(
        url,
        min(len(moments), MOST_CLIENTS),
        moments,
        row.seconds,
        [f"{PROMPT} {seed} {number}" for number in range(len(moments))],
        partials=0,
        key=os.environ.get(KEY_VARIABLE),
    )


def told_of(service: Service, measured: Measured) -> Told:
    """A measurement as a simulation tells of it: of what was answered in the time that both tell of."""
    from hart_runtime.bench.load import BUSY, DRAWN
    from hart_runtime.bench.scale import Told

    told = Told(service)
    for answer in measured.answers:
        if answer.outcome == BUSY:
            told.refused += answer.came >= service.warm_up
        elif answer.outcome == DRAWN:
            assert answer.whole is not None
            if service.warm_up <= answer.came + answer.whole < service.seconds:
                told.waited.append(answer.whole)
    return told


def _judge(row: Row, measured: Mapping[str, float], outcomes: Mapping[str, int]) -> None:
    """Tell of both, and refuse what is far from its prediction."""
    from hart_runtime.bench.load import BUSY, DRAWN

    if others := [name for name in outcomes if name not in (BUSY, DRAWN)]:
        raise RunError(f"requests were answered neither with a picture nor with 429: {', '.join(others)}")
    far = []
    for name, allowed in ALLOWED.items():
        predicted, words = getattr(row, name), name.replace("_", " ")
        off = measured[name] / predicted - 1
        click.echo(
            f"{words}: predicted {predicted:.4g}, measured {measured[name]:.4g}, {off:+.1%} of {allowed:.0%}"
        )
        if not abs(off) <= allowed:
            far.append(words)
    if far:
        raise RunError(f"further from the prediction than allowed: {', '.join(far)}")
