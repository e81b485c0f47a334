"""The server under load: everybody is served or told to wait, and gets the bytes of hart-run."""

from __future__ import annotations

import base64
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hart_runtime.bench.cli import main as bench
from hart_runtime.bench.load import OTHER, Load, measure_load
from hart_runtime.bench.prediction import Prediction, Row, write_prediction
from hart_runtime.bench.scale import arrivals
from hart_runtime.serve.fields import FIELDS
from tests.serving import PROMPT, Running, hart_run, later, serving, until

pytestmark = pytest.mark.serve
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from([*FIELDS]) | st.text(max_size=12)
BODIES = st.dictionaries(FIELD, JSON, max_size=6).map(
    lambda body: json.dumps({"n": 11, **body}).encode()
) | st.binary(max_size=200)
"""Nearly all of them ask for too many, so that few are drawn."""


def test_malformed_bodies_by_the_thousand(server: Running) -> None:
    refused = 0
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        @given(BODIES)
        def ask(body: bytes) -> None:
            nonlocal refused
            headers = {"Content-Type": "application/json"}
            answer = client.post("/v1/images/generations", content=body, headers=headers)
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"]
                assert error["type"] == "invalid_request_error"
                refused += 1

        ask()
    assert refused > 900
    assert len(server.drawn()) == 1
    assert "Traceback" not in server.log.read_text()


def test_malformed_requests(server: Running) -> None:
    """Bytes that are hardly HTTP; the server goes on."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    chance = random.Random(0)
    good = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    for _ in range(200):
        broken = bytearray(good)
        for _ in range(chance.randrange(1, 5)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        with socket.create_connection((host, int(port)), 60) as connection:
            connection.sendall(broken[: chance.randrange(1, len(broken) + 1)])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert len(server.drawn()) == 1
    until(server.idle)


def test_many_clients(demo_bundle: Path, tmp_path: Path) -> None:
    """64 of them: no error but 429, health answers all the while, every picture is that of hart-run."""
    expected = hart_run(demo_bundle, tmp_path, "--num-images", 8, "--seed", 0, "--threads", 1)
    with serving("--engine", demo_bundle, "--threads", 1, "--queue", 32) as server:

        def client(number: int) -> list[str]:
            outcomes = []
            for turn in range(4):
                seed = (number + turn) % 8
                answer = server.post({"prompt": PROMPT, "seed": seed})
                if answer.status_code == 200:
                    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
                    outcomes.append("equal" if data == expected[seed] else "other bytes")
                else:
                    outcomes.append(str(answer.status_code))
            return outcomes

        with ThreadPoolExecutor(64) as pool:
            running = [pool.submit(client, number) for number in range(64)]
            healthy = 0
            while not all(future.done() for future in running):
                assert server.get("/health").status_code == 200
                healthy += 1
        found = [outcome for future in running for outcome in future.result()]
        assert set(found) <= {"equal", "429"}
        assert found.count("equal") >= 64
        assert healthy > 10
        assert server.outcomes()["drawn"] == found.count("equal")
        assert server.outcomes()["busy"] == found.count("429")
        assert psutil.Process(server.process.pid).num_threads() < 20


def test_clients_that_ask_again_are_drawn_together(server: Running) -> None:
    """A worker waits a moment for the one who was just answered: else two take turns for ever."""
    until(server.idle)
    before = server.metrics()
    again = later(lambda: [server.drawn(steps=250) for _ in range(2)])
    until(lambda: server.metrics()["hart_requests_received_total"] > before["hart_requests_received_total"])
    server.drawn(steps=250)
    again.result()
    after = server.metrics()
    pictures, batches = (
        after[name] - before[name] for name in ("hart_batch_pictures_sum", "hart_batch_pictures_count")
    )
    assert (pictures, batches) == (3, 2)


@pytest.mark.parametrize("how", [("--clients", 3), ("--rate", 20, "--clients", 40)])
def test_the_load_generator(server: Running, how: tuple[object, ...]) -> None:
    before = server.outcomes()
    options = ["serve", "--url", server.url, "--seconds", 2, "--json", *how]
    done = CliRunner().invoke(bench, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    after = server.outcomes()
    assert told["outcomes"].get("drawn", 0) == after["drawn"] - before["drawn"] > 0
    assert told["outcomes"].get("429", 0) == after["busy"] - before["busy"]
    assert set(told["outcomes"]) <= {"drawn", "429"}
    for name in ("first", "whole"):
        found = [told[name][share] for share in ("50", "90", "99")]
        assert found == sorted(found)
    assert told["first"]["50"] <= told["whole"]["50"]


def test_a_service_beside_what_was_predicted_of_it(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request of the simulation is asked, none twice; nobody is as slow as this prediction."""
    row = Row(1, 1, 10.0, 8, 2.0, 0.5, 2, 1.0, 1e6, 1e6, 0, 0, 0.5, 1.0, 0.0, 0.0)
    write_prediction(Prediction("x", "x", "x", (row,)), tmp_path / "prediction.json")
    monkeypatch.setattr("hart_runtime.bench.scale_check.LISTEN", 0.1)
    before = server.outcomes()["drawn"]
    words = ["scale-check", tmp_path / "prediction.json", "--url", server.url]
    done = CliRunner().invoke(bench, [str(word) for word in words])
    assert done.exit_code == 1
    assert "further from the prediction than allowed: " in done.stderr
    assert "p50: predicted 1e+06, measured " in done.stdout
    asked = sum(len([*takewhile(lambda moment: moment < 2, arrivals(10, seed))]) for seed in range(2))
    assert server.outcomes()["drawn"] - before == asked
    assert f"drawn: {asked}; after the warm-up 0 refused, predicted 0" in done.stdout


def test_a_server_beside_its_bundle(demo_bundle: Path) -> None:
    """Every picture is that of hart-run, and the counts are of this machine's order."""
    options = ["serve", "--engine", demo_bundle, "--device", "cpu", "--threads", 1, "--clients", 12]
    load = ["--seconds", 4, "--num-images", 2, "--prompt", PROMPT, "--prompt", "a blue star", "--json"]
    done = CliRunner().invoke(bench, [str(option) for option in (*options, *load)])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    assert set(told["outcomes"]) <= {"drawn", "429"}
    assert told["outcomes"]["drawn"] >= 12
    assert told["hart_bench"]["batch"] == 8
    alone = told["hart_bench"]
    assert told["ratio"] == told["pictures_per_second"] / alone["pictures_per_second"] > 0
    assert alone["seconds_per_picture"] > 0
    assert 0 < told["health"]["p50"] <= told["health"]["p99"]
    assert 0 < told["server_seconds_per_picture"] < told["worker_seconds_per_picture"]
    assert len(told["memory"]) == 4
    assert max(told["memory"]) < 1.2 * min(told["memory"])


def test_pictures_that_are_not_those_of_hart_run_are_told_of(server: Running) -> None:
    wanted = {("a blue star", 0): b"another picture"}
    load = Load(server.url, clients=1, seconds=1, prompts=("a blue star",), wanted=wanted)
    assert set(measure_load(load).outcomes) == {OTHER}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--url"),
        (["--url", "http://127.0.0.1:9", "--engine", "x"], "either --url"),
        (["--url", "http://127.0.0.1:9", "--threads", "1"], "--threads"),
    ],
)
def test_which_server(options: list[str], said: str) -> None:
    done = CliRunner().invoke(bench, ["serve", *options])
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://x", "nothing"])
def test_nobody_there(url: str) -> None:
    done = CliRunner().invoke(bench, ["serve", "--url", url])
    assert done.exit_code == 2
    assert "--url" in done.stderr
