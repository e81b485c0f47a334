"""The simulated service against the theory of queues, and against itself."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hart_runtime.bench import scale_check, scale_cli
from hart_runtime.bench.cli import main as bench
from hart_runtime.bench.load import BUSY, DRAWN, Answer, Load, Measured
from hart_runtime.bench.prediction import Prediction, Row, write_prediction
from hart_runtime.bench.scale import (
    GATHERING,
    LOOK,
    MOST_GATHERING,
    Service,
    Times,
    Told,
    arrivals,
    simulate,
)
from hart_runtime.serve import scheduler

ONE = Service(rate=0.6, workers=1, batch=1, room=10**9, seconds=40_000, warm_up=1000)
SECOND = Times({1: [1.0]})


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_one_worker_waits_as_pollaczek_and_khinchine_say(share: float) -> None:
    """Arrivals by chance, equal times: the mean is S + S share / (2 (1 - share))."""
    told = simulate(replace(ONE, rate=share), SECOND)
    assert np.mean(told.waited) == pytest.approx(1 + share / (2 * (1 - share)), rel=0.05)
    assert told.summary()["busy"] == pytest.approx(share, rel=0.05)
    assert told.throughput == pytest.approx(share, rel=0.05)


def test_two_queues_are_better_than_one_worker_and_worse_than_one_queue() -> None:
    """Arrivals by chance, equal times, most of two queues chosen right: between M/D/1 and M/D/2."""
    told = simulate(replace(ONE, rate=1.2, workers=2), SECOND)
    one_worker = 1 + 0.6 / (2 * (1 - 0.6))
    one_queue = 1 + 0.45 / (2 - 1.2) / 2  # half of M/M/2's, where somebody waits with a probability of 0.45
    assert one_queue < np.mean(told.waited) < one_worker
    assert told.summary()["busy"] == pytest.approx(0.6, rel=0.05)


def test_requests_come_by_chance_and_at_the_same_moments_again() -> None:
    steps = np.diff([0, *islice(arrivals(2.0, 7), 20_000)])
    assert np.mean(steps) == pytest.approx(0.5, rel=0.03)
    assert np.std(steps) == pytest.approx(0.5, rel=0.05)
    assert [*islice(arrivals(2.0, 7), 9)] == [*islice(arrivals(2.0, 7), 9)] != [*islice(arrivals(2.0, 8), 9)]


def test_no_request_is_lost() -> None:
    """Not to failures, nor to workers that an autoscaler ends."""
    service = Service(
        rate=20,
        workers=1,
        most_workers=10,
        batch=8,
        room=10**6,
        seconds=4000,
        warm_up=0,
        between_failures=0.1,
        patience_up=LOOK,
        patience_down=LOOK,
    )
    told = simulate(service, Times({1: [0.2], 8: [0.8]}))
    asked = sum(1 for _ in takewhile(lambda moment: moment < 4000, arrivals(20, 0)))
    assert told.again > 0
    assert told.refused == 0
    assert asked - 200 < len(told.waited) <= asked
    assert 1 < told.summary()["mean_workers"] < 10


def test_runs_are_told_of_together() -> None:
    runs = [simulate(replace(ONE, seconds=2000), SECOND, seed) for seed in range(3)]
    told = Told.together(runs)
    assert told.throughput == pytest.approx(np.mean([one.throughput for one in runs]))
    assert told.summary()["busy"] == pytest.approx(np.mean([one.summary()["busy"] for one in runs]))
    assert told.quantile(1) == max(one.quantile(1) for one in runs)


def test_what_does_not_fit_is_refused_and_batches_are_full() -> None:
    times = Times({1: [0.2], 8: [0.8]})
    told = simulate(Service(rate=40, workers=2, batch=8, room=64, seconds=400), times)
    assert told.refused > 0
    assert told.throughput == pytest.approx(2 * 8 / 0.8, rel=0.06)
    assert told.summary()["busy"] > 0.95


def test_times_lie_on_the_lines_between_what_was_measured() -> None:
    times = Times({4: [2.0, 2.2, 1.8], 1: [1.0], 8: [6.0]})
    assert [times.median(batch) for batch in (1, 2, 4, 6, 8, 10)] == pytest.approx([1, 4 / 3, 2, 4, 6, 8])
    assert sorted(times.spread) == pytest.approx([0.9, 1, 1, 1, 1.1])


ROW = Row(
    workers=2,
    most_workers=2,
    rate=5.0,
    batch=4,
    seconds=100.0,
    warm_up=25.0,
    runs=2,
    pictures_per_second=5.0,
    p50=1.0,
    p99=1.0,
    refused=0,
    again=0,
    busy=0.6,
    mean_workers=2.0,
    network_gbit=0.0,
    storage_tb_a_day=0.0,
)


def checked(file: Path, *rows: Row) -> Result:
    write_prediction(Prediction("bench.json", "yesterday", "today", rows), file)
    return CliRunner().invoke(bench, ["scale-check", str(file), "--url", "http://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("slower", "outcome", "said"),
    [
        (1.1, DRAWN, ""),
        (1.2, DRAWN, "error: further from the prediction than allowed: p50\n"),
        (1.4, DRAWN, "error: further from the prediction than allowed: p50, p99\n"),
        (1.0, BUSY, "error: further from the prediction than allowed: pictures per second, p50, p99\n"),
        (1.0, "500", "error: requests were answered neither with a picture nor with 429: 500\n"),
    ],
)
def test_a_measurement_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, outcome: str, said: str
) -> None:
    loads = []

    def measure(load: Load) -> Measured:
        loads.append(load)
        return Measured(load, 100.0, [Answer(outcome, None, slower, came) for came in load.moments])

    monkeypatch.setattr("hart_runtime.bench.load.measure_load", measure)
    monkeypatch.setattr(scale_check, "LISTEN", 0.01)
    done = checked(tmp_path / "prediction.json", ROW)
    assert (done.exit_code, done.stderr) == (1 if said else 0, said)
    assert done.stdout.startswith("predicted today from bench.json, measured yesterday\n")
    assert [load.moments for load in loads] == [
        [*takewhile(lambda moment: moment < 100, arrivals(5, seed))] for seed in range(2)
    ]
    assert len({prompt for load in loads for prompt in load.prompts}) == sum(
        len(one.moments) for one in loads
    )


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    file = tmp_path / "prediction.json"
    for rows in ((ROW, ROW), (replace(ROW, most_workers=4),)):
        done = checked(file, *rows)
        assert done.exit_code == 2
        assert "expected a prediction of one number of workers; predict --workers 2" in done.stderr
    done = checked(file, ROW)
    assert (done.exit_code, "nobody answers there" in done.stderr) == (2, True)
    file.write_text("{}")
    done = CliRunner().invoke(bench, ["scale-check", str(file), "--url", "x"])
    assert (done.exit_code, "result is missing; predict again" in done.stderr) == (2, True)


def test_it_waits_as_the_scheduler_does() -> None:
    assert (GATHERING, MOST_GATHERING) == (scheduler.GATHERING, scheduler.MOST_GATHERING)
    assert asdict(ONE)["room"] == 10**9
    assert scale_cli.WAITING == 64
