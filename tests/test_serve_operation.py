"""Workers and servers that die, clients that are slow or leave, and logs that are full."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import (
    LONG,
    PATIENCE,
    PROMPT,
    Running,
    events_of,
    later,
    serving,
    until,
)

pytestmark = pytest.mark.serve


def test_a_worker_that_is_killed_is_replaced(server: Running) -> None:
    """Its requests fail with 500, waiting ones are drawn by the next."""
    restarts = server.metrics()["hart_worker_restarts_total"]
    with server.stream(steps=LONG, partial_images=1) as response:
        events = events_of(response)
        next(events)
        waiting = later(server.drawn, seed=1)
        until(lambda: server.metrics()["hart_queue_pictures"] == 1)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        assert next(events)["error"]["code"] == "server_error"
    assert waiting.result() == server.drawn(seed=1)
    assert server.metrics()["hart_worker_restarts_total"] == restarts + 1
    until(server.idle)


def test_workers_end_with_a_server_that_is_killed(demo_bundle: Path) -> None:
    with serving("--engine", demo_bundle, "--threads", 1) as server:
        workers = server.workers()
        with server.busy():
            server.process.kill()
            server.ended()
    until(lambda: not any(psutil.pid_exists(pid) for pid in workers))


def test_a_bundle_that_cannot_be_opened_fails_the_start(demo_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(demo_bundle, tmp_path / "b"))
    weights = bytearray((broken / "weights.bin").read_bytes())
    weights[100] ^= 1
    (broken / "weights.bin").write_bytes(weights)
    with serving("--engine", broken, ready=False) as server:
        assert server.ended() == 2
        log = server.log.read_text()
    assert "error: " in log
    assert "weights.bin" in log
    assert "Traceback" not in log
    with serving("--engine", tmp_path / "nothing", ready=False) as server:
        assert server.ended() == 2


def test_a_request_that_waits_too_long_is_given_up(demo_bundle: Path) -> None:
    with serving("--engine", demo_bundle, "--threads", 1, "--timeout", 2) as server:
        late = server.post({"prompt": PROMPT, "steps": LONG, "n": 8})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_exceeded")
        assert late.headers["x-should-retry"] == "false"
        assert len(server.drawn()) == 1
        assert server.outcomes()["failed"] == 1


def test_slow_readers_hold_nobody_up(server: Running) -> None:
    """One that never reads its answer, and halves of connections."""
    body = json.dumps({"prompt": PROMPT, "stream": True, "partial_images": 5, "n": 10}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    address = server.url.removeprefix("http://").rsplit(":", 1)
    slow = [socket.create_connection((address[0], int(address[1])), 60) for _ in range(3)]
    slow[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    slow[0].sendall(head + body)
    slow[1].sendall(head + body)
    slow[1].shutdown(socket.SHUT_WR)
    slow[2].sendall(head[:-2])
    assert len(server.drawn(seed=1)) == 1
    for connection in slow:
        connection.close()
    until(server.idle)


def test_headers_and_bodies_that_never_end_are_given_up(server: Running) -> None:
    """A byte now and then keeps no connection, of a first request or of another one."""
    address = server.url.removeprefix("http://").rsplit(":", 1)
    post = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    beginnings = {
        "nothing": b"",
        "a header": post,
        "another request": health + post,
        "a body": post + b"Content-Length: 100\r\n\r\n{",
    }
    slow = {name: socket.create_connection((address[0], int(address[1])), 60) for name in beginnings}
    for name, connection in slow.items():
        connection.sendall(beginnings[name])
    with ThreadPoolExecutor(len(slow)) as pool:
        answers = dict(zip(slow, pool.map(_dripped, slow.values()), strict=True))
    assert answers["nothing"] == answers["a header"] == b""
    assert answers["another request"].count(b"HTTP/1.1") == 1
    assert b"body_timeout" in answers["a body"]
    with socket.create_connection((address[0], int(address[1])), 60) as connection:
        connection.sendall(post + b"X: " + b"x" * (1 << 20))
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    until(server.idle)
    assert psutil.Process(server.process.pid).num_threads() < 20


def _dripped(connection: socket.socket) -> bytes:
    """What a server says to a client who sends a byte now and then, until it hangs up."""
    came = b""
    connection.settimeout(0.5)
    for _ in range(2 * PATIENCE):
        try:
            data = connection.recv(65536)
        except TimeoutError:
            with contextlib.suppress(OSError):
                connection.send(b"x")
            continue
        except ConnectionError:
            return came
        if not data:
            return came
        came += data
    raise AssertionError("it never hung up")


def test_two_workers(demo_bundle: Path) -> None:
    """Draw at the same time; one that dies takes nobody along who is drawn by the other."""
    with serving("--engine", demo_bundle, "--threads", 1, "--workers", 2) as server:
        until(lambda: len(server.workers()) == 2)
        with server.busy():
            two = len(server.drawn(seed=1))
            assert two == 1, "the other one draws"
            with server.busy():
                waiting = later(server.drawn, seed=2)
                until(lambda: server.metrics()["hart_queue_pictures"] == 1)
            assert waiting.result() == server.drawn(seed=2)
        until(server.idle)
        before = server.workers()
        with server.stream(steps=LONG) as one, server.stream(steps=LONG) as other:
            os.kill(before[0], signal.SIGKILL)
            told = later(lambda: [*events_of(one)]), later(lambda: [*events_of(other)])
            until(lambda: any(future.done() for future in told))
            lost = [future.result() for future in told if future.done()]
            assert [events[-1]["error"]["code"] for events in lost] == ["server_error"]
            until(lambda: len(server.workers()) == 2 and before[0] not in server.workers())
            assert before[1] in server.workers()
            assert server.metrics()["hart_worker_restarts_total"] == 1


def test_a_third_of_the_clients_hangs_up(server: Running) -> None:
    """The rest is served, what is counted adds up, and nothing is left behind."""
    alone = {seed: server.drawn(seed=seed)[0] for seed in range(6)}
    received = server.metrics()["hart_requests_received_total"]

    def draw(number: int) -> bool:
        seed = number % 6
        if number % 3:
            answer = server.post({"prompt": PROMPT, "seed": seed})
            if answer.status_code == 429:
                return True
            return base64.b64decode(answer.json()["data"][0]["b64_json"]) == alone[seed]
        try:
            with server.stream(seed=seed, n=2, steps=30, partial_images=2) as response:
                for _ in zip(events_of(response), range(number % 4), strict=False):
                    pass
        except httpx.HTTPError:
            pass
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(draw, range(36)))
    until(server.idle)
    found = server.metrics()
    assert found["hart_requests_received_total"] == received + 36
    assert found["hart_queue_pictures"] == 0
    assert psutil.Process(server.process.pid).num_threads() < 20


def test_a_log_that_cannot_be_written_stops_nobody(demo_bundle: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with serving("--engine", demo_bundle, "--threads", 1, log="/dev/full") as server:
        assert len(server.drawn()) == 1
        assert server.get("/health").status_code == 200
