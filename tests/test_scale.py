"""The simulated service against the theory of queues, and against itself."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from hart_runtime.bench import scale_cli
from hart_runtime.bench.scale import GATHERING, MOST_GATHERING, Service, Times, simulate
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


def test_no_request_is_lost() -> None:
    """Not to failures, nor to workers that an autoscaler ends."""
    service = Service(
        rate=20, workers=1, most_workers=10, batch=8, room=640, seconds=2000, warm_up=0, between_failures=0.1
    )
    told = simulate(service, Times({1: [0.2], 8: [0.8]}))
    assert told.again > 0
    assert len(told.waited) + told.refused == pytest.approx(20 * 2000, rel=0.05)
    assert 1 < told.summary()["mean_workers"] <= 10


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


def test_it_waits_as_the_scheduler_does() -> None:
    assert (GATHERING, MOST_GATHERING) == (scheduler.GATHERING, scheduler.MOST_GATHERING)
    assert asdict(ONE)["room"] == 10**9
    assert scale_cli.WAITING == 64
