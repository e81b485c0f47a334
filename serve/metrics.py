"""What is counted, for ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hart_runtime.runtime.stages import summed

DRAWN, REFUSED, BUSY, GONE, FAILED = "drawn", "refused", "busy", "gone", "failed"
OUTCOMES = (DRAWN, REFUSED, BUSY, GONE, FAILED)
"""How a request for pictures ends; every one ends in one of these."""

GONE_STATUS = 499
"""Of a client that did not wait; nobody gets it."""


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        told = self.registry
        self.received = Counter("hart_requests_received", "Requests for pictures.", registry=told)
        self.requests = Counter("hart_requests", "Those that ended.", ["outcome"], registry=told)
        self.waiting = Gauge("hart_queue_pictures", "Pictures that wait.", registry=told)
        self.ready = Gauge("hart_ready", "Whether requests are taken and drawn.", registry=told)
        self.batches = Histogram(
            "hart_batch_pictures", "Pictures drawn together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=told
        )
        self.stages = Counter("hart_stage_seconds", "Time spent drawing.", ["stage"], registry=told)
        self.pictures = Counter("hart_pictures", "Pictures handed out.", registry=told)
        self.prompts = Counter("hart_prompts_encoded", "Prompts not known from before.", registry=told)
        self.stopped = Counter(
            "hart_batches_stopped", "Batches that nobody waited for any more.", registry=told
        )
        self.restarts = Counter(
            "hart_worker_restarts", "Workers that died and were started again.", registry=told
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

    def drawn(self, pictures: int, seconds: Mapping[str, float], encoded: int) -> None:
        """A batch."""
        self.batches.observe(pictures)
        self.prompts.inc(encoded)
        for stage, value in summed(dict(seconds)).items():
            self.stages.labels(stage).inc(value)

    def ended(self, status: int) -> None:
        """A request, by the status it was answered with."""
        if status == GONE_STATUS:
            outcome = GONE
        elif status == 429:
            outcome = BUSY
        else:
            outcome = FAILED if status >= 500 else REFUSED if status >= 400 else DRAWN
        self.requests.labels(outcome).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
