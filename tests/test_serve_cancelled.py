"""Requests that are cancelled, as Ray Serve does where a client leaves: each is counted and waits no more."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from hart_runtime.serve.app import create_app
from hart_runtime.serve.metrics import Metrics
from hart_runtime.serve.models import find_models
from hart_runtime.serve.scheduler import Scheduler
from tests.serving import PROMPT

pytestmark = pytest.mark.serve


@pytest.mark.parametrize("body", [None, {}, {"stream": True}])
def test_a_cancelled_request_is_one_of_a_client_that_left(
    demo_bundle: Path, body: dict[str, object] | None
) -> None:
    """While its body is awaited, its pictures, or its events; nobody draws here."""
    asyncio.run(_cancelled(demo_bundle, body))


async def _cancelled(bundle: Path, body: dict[str, object] | None) -> None:
    metrics = Metrics()
    scheduler = Scheduler([], metrics, room=10, patience=600)
    app = create_app(scheduler, find_models([bundle]))
    messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
    if body is not None:
        whole = json.dumps({"prompt": PROMPT, **body}).encode()
        messages.put_nowait({"type": "http.request", "body": whole, "more_body": False})

    async def send(_: object) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images/generations",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {"name": "of-a-test"},
    }
    request = asyncio.ensure_future(app(scope, messages.get, send))  # type: ignore[arg-type]
    while b"hart_requests_received_total 1.0" not in metrics.text() or (
        body is not None and not scheduler.orders
    ):
        assert not request.done(), request.result()
        await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.wait({request})
    assert request.cancelled()
    assert b'hart_requests_total{outcome="gone"} 1.0' in metrics.text()
    assert not scheduler.orders
    assert not scheduler.waiting
